"""`python -m forwardgrad` is the `forwardgrad` command."""

from forwardgrad.lab.cli import main

if __name__ == "__main__":
    main()
