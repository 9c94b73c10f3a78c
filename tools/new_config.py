"""`mmslak new-config`, for those who have the clone."""

from mmslak.cli.new_config import main

if __name__ == '__main__':
    raise SystemExit(main())
