"""`python -m diptych`: the command line, for where the console script is not on the path (`torchrun -m diptych …`)."""

from diptych.cli.app import main

if __name__ == "__main__":
    main()
