from grbench.cli import main

main()
