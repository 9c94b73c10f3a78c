"""`mmslak prepare-data`, for those who have the clone."""

from mmslak.cli.prepare_data import main

if __name__ == '__main__':
    raise SystemExit(main())
