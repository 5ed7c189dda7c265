"""Quantized networks in simulation: folded, scaled, and with learned rounding."""
