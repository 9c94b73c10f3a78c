"""`mmslak run-demo-compact`, for those who have the clone."""

from mmslak.cli.run_demo_compact import main

if __name__ == '__main__':
    raise SystemExit(main())
