"""`python -m penjing`: the command line of the interpreter at hand."""

from penjing.cli.main import main

if __name__ == "__main__":
    main()
