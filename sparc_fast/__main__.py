from sparc_fast.cli import main

raise SystemExit(main())
