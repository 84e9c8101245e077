# The network card of the flat guest, an rtl8139: looked at between two writes, in memory alone, and every frame it has got is sent
# back with its addresses exchanged. Of the cards QEMU has it is one that adds nothing to a stop.
#
#   0x00400000   what the card has received, one frame behind the other, and nothing but zeros where it will go on
#   0x00408000   one word: which of its four places the next answer is sent from
#
# %esi: the card's ports; %ebx: where the next frame will be, which the guest looks at.

        .set    RECEIVED, 0x00400000
        .set    RECEIVED_BYTES, 8192
        .set    NEXT, 0x00408000

# Finds the card and sets it going.
card:
        movl    $RECEIVED, %ebx
        movl    $0x80000000, %ecx       # bus 0, device 0
1:      movl    %ecx, %eax
        call    configuration
        cmpl    $0x813910ec, %eax
        je      2f
        addl    $0x800, %ecx
        cmpl    $0x80010000, %ecx
        jb      1b
        ret                             # nothing will come
2:      leal    0x10(%ecx), %eax        # the firmware has given it its ports
        call    configuration
        movl    %eax, %esi
        andl    $~0x3, %esi
        leal    0x04(%ecx), %eax
        call    configuration
        orl     $0x5, %eax              # ports, bus master
        outl    %eax, %dx

        leal    0x37(%esi), %edx        # the command register: reset
        movb    $0x10, %al
        outb    %al, %dx
3:      inb     %dx, %al
        testb   $0x10, %al
        jnz     3b
        leal    0x30(%esi), %edx        # where to
        movl    $RECEIVED, %eax
        outl    %eax, %dx
        leal    0x3c(%esi), %edx        # no interrupts
        xorl    %eax, %eax
        outw    %ax, %dx
        leal    0x37(%esi), %edx        # receive and send
        movb    $0x0c, %al
        outb    %al, %dx
        leal    0x44(%esi), %edx        # for whomever, 8 KiB, the last frame beyond them
        movl    $0x8f, %eax
        outl    %eax, %dx
        ret

# The configuration word %eax names, in %eax; %dx is then the port to write it.
configuration:
        movw    $0xcf8, %dx
        outl    %eax, %dx
        movw    $0xcfc, %dx
        inl     %dx, %eax
        ret

# Answers what is there. Keeps %ecx, %edi, %ebp.
answer:
        pushl   %ecx
        pushl   %edi
        leal    0x37(%esi), %edx        # answered when the card has written all of the frame, whose head comes first
        inb     %dx, %al
        leal    4(%ebx), %edi
        movl    (%edi), %eax            # who sent it gets it
        xchgl   %eax, 6(%edi)
        movl    %eax, (%edi)
        movw    4(%edi), %ax
        xchgw   %ax, 10(%edi)
        movw    %ax, 4(%edi)
        movl    NEXT, %ecx
        leal    0x20(%esi,%ecx,4), %edx
        movl    %edi, %eax
        outl    %eax, %dx
        movzwl  2(%ebx), %eax           # without the checksum
        subl    $4, %eax
        leal    0x10(%esi,%ecx,4), %edx
        outl    %eax, %dx               # read by the card before this is done
        incl    %ecx
        andl    $3, %ecx
        movl    %ecx, NEXT
        movzwl  2(%ebx), %ecx           # head, frame and checksum
        addl    $7, %ecx
        shrl    $2, %ecx
        movl    %ebx, %edi
        xorl    %eax, %eax
        cld
        rep     stosl
        subl    $RECEIVED, %edi
        andl    $(RECEIVED_BYTES - 1), %edi
        leal    RECEIVED(%edi), %ebx
        leal    -16(%edi), %eax         # so far it has been read
        leal    0x38(%esi), %edx
        outw    %ax, %dx
        popl    %edi
        popl    %ecx
        ret
