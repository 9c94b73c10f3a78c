"""`mmslak train`, for those who have the clone."""

from mmslak.cli.train import main

if __name__ == '__main__':
    raise SystemExit(main())
