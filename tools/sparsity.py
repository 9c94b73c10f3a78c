"""`mmslak sparsity`, for those who have the clone."""

from mmslak.cli.sparsity import main

if __name__ == '__main__':
    raise SystemExit(main())
