# A guest without an operating system (32 bits, multiboot) that does nothing but dirty memory, round after round:
#
#   0x00200000   one word: the number of the round
#   0x00300000   one word: 1 in odd rounds, 0 in even ones, so that the page is all zeros every other round
#   0x01000000   PAGES pages, the number of the round in the first word of each
#
# With CARD defined it also answers requests: see card.S, which is then read behind this.
#
# as --32 --defsym PAGES=1000 flat-guest.S -o flat-guest.o
# ld -m elf_i386 -e start --section-start=.multiboot=0x100000 -Ttext=0x100020 flat-guest.o -o flat-guest.elf

        .set    MAGIC, 0x1badb002
        .set    FLAGS, 0x00000003

        .section .multiboot, "a"
        .align  4
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)

        .text
        .globl  start
start:
        cli
        xorl    %ebp, %ebp
        .ifdef  CARD
        movl    $0x500000, %esp
        call    card
        .endif
round:
        .ifdef  CARD
        testb   $1, (%ebx)
        jz      1f
        call    answer
1:
        .endif
        incl    %ebp
        movl    %ebp, 0x200000
        movl    %ebp, %eax
        andl    $1, %eax
        movl    %eax, 0x300000
        movl    $0x1000000, %edi
        movl    $PAGES, %ecx
        jecxz   round
page:
        .ifdef  CARD
        testb   $1, (%ebx)
        jz      1f
        call    answer
1:
        .endif
        movl    %ebp, (%edi)
        addl    $4096, %edi
        loop    page
        jmp     round
