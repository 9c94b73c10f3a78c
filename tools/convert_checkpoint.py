"""`mmslak convert-checkpoint`, for those who have the clone."""

from mmslak.cli.convert_checkpoint import main

if __name__ == '__main__':
    raise SystemExit(main())
