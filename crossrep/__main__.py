from crossrep.cli import main

main()
