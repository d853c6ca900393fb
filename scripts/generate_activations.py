from clt.__main__ import main

main(["generate", *__import__("sys").argv[1:]])
