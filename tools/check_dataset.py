"""`mmslak check-dataset`, for those who have the clone."""

from mmslak.cli.check_dataset import main

if __name__ == '__main__':
    raise SystemExit(main())
