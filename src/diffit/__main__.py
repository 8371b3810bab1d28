from diffit.cli import main

main()
