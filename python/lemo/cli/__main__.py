import sys

from lemo.cli import main

sys.exit(main())
