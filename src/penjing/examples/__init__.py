"""Task files that the package carries; `penjing demo` copies one into its folder."""
