"""Run the `householder` command as `python -m householder`."""

from householder.cli import main

if __name__ == "__main__":
    main()
