"""`mmslak get-checkpoint`, for those who have the clone."""

from mmslak.cli.get_checkpoint import main

if __name__ == '__main__':
    raise SystemExit(main())
