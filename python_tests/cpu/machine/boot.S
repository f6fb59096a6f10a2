// A ROM of 64 KiB at the end of the first MiB and of the 4 GiB: from the reset vector to long mode with 4 GiB of memory
// mapped one to one, then `start` of machine.c. No interrupt ever comes; exceptions and system calls end up there too.
    .section .boot, "ax"
    .code16
real:
    cli
    cld
    movw $0xf000, %ax
    movw %ax, %ds
    lgdtl descriptors_at - 0xf0000
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $protected
    .code32
protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    // Tables at 0x10000, pages of 2 MiB.
    movl $0x10000, %edi
    xorl %eax, %eax
    movl $0x1800, %ecx
    rep stosl
    movl $0x11003, 0x10000
    movl $0x12003, 0x11000
    movl $0x13003, 0x11008
    movl $0x14003, 0x11010
    movl $0x15003, 0x11018
    movl $0x12000, %edi
    movl $0x83, %eax
    movl $2048, %ecx
1:  movl %eax, (%edi)
    addl $8, %edi
    addl $0x200000, %eax
    loop 1b
    movl $0x620, %eax        // CR4: PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0x10000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx   // EFER: SCE, LME
    movl $0x101, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000033, %eax   // CR0: PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $0x18, $long_mode
    .code64
long_mode:
    movw $0x20, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    fninit
    movl $stack_end, %esp
    call start

    .text
    .globl exceptions, system_call
    .balign 16
exceptions:                  // 16 bytes each
    .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign 16
    .if (\vector == 8) || ((\vector >= 10) && (\vector <= 14)) || (\vector == 17) || (\vector == 21)
    .else
    push $0
    .endif
    push $\vector
    jmp 2f
    .endr
2:  pop %rdi
    pop %rsi
    pop %rdx
    andq $-16, %rsp
    call exception

system_call:                 // of the program, which is in ring 0 as well: rcx is where it goes on
    movq %rsp, program_stack
    movl $stack_end, %esp
    .irp register, rcx, r11, rdi, rsi, rdx, r10, r8, r9
    push %\register
    .endr
    movq %rdx, %rcx
    movq %rsi, %rdx
    movq %rdi, %rsi
    movq %rax, %rdi
    call answer
    .irp register, r9, r8, r10, rdx, rsi, rdi
    pop %\register
    .endr
    popfq
    pop %rcx
    movq program_stack, %rsp
    jmp *%rcx

    .section .rodata
    .balign 8
descriptors:
    .quad 0
    .quad 0x00cf9b000000ffff // 08 code, 32 bits
    .quad 0x00cf93000000ffff // 10 data
    .quad 0x00af9b000000ffff // 18 code, 64 bits
    .quad 0x00cf93000000ffff // 20 data
descriptors_at:
    .word descriptors_at - descriptors - 1
    .long descriptors

    .bss
program_stack:
    .quad 0
    .balign 16
    .skip 0x4000
stack_end:

    .section .reset, "ax"
    .code16
    .byte 0xea               // far jump to `real`
    .word 0, 0xf000
    .balign 16, 0

    .section .note.GNU-stack, "", @progbits
