# A 32-bit multiboot guest that never stops changing 64 pages from 4 MiB on: three of four get a counter, the
# fourth the counter's lowest bit, so that it is a page of zeros half of the time.
	.set MAGIC, 0x1badb002
	.set FLAGS, 3			# modules page-aligned, memory map
	.set FIRST, 0x400000
	.set PAGES, 64
	.section .multiboot, "a"
	.align 4
	.long MAGIC, FLAGS, -(MAGIC + FLAGS)
	.text
	.globl _start
_start:
	cli
	xor %ebp, %ebp
round:
	inc %ebp
	mov $FIRST, %edi
	mov $PAGES, %ecx
page:
	mov %ebp, %eax
	test $3, %ecx
	jnz store
	and $1, %eax
store:
	mov %eax, (%edi)
	add $4096, %edi
	dec %ecx
	jnz page
	jmp round
