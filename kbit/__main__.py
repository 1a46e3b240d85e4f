"""`python -m kbit`: the same as the `kbit` command."""

from kbit.cli.main import main

if __name__ == "__main__":
    main()
