"""`python -m fat5convert`."""

from fat5convert.entry import main

main()
