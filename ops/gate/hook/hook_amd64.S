/* Copyright The cri-proxy Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* The hook that holds a container's process just before its entrypoint, as a whole */
/* ELF program. It runs inside the container, under its user, seccomp filter and limits: hence no */
/* runtime, no memory, no threads, and only the system calls setitimer, openat, close, read and exit. */
/*  */
/* usage: hook FIFO */
/*  */
/* It waits for a writer of the FIFO and reads one byte: 'g' ends it with 0 and lets the */
/* entrypoint run; any other ends it with 9, which ends the container. When the writer goes away without */
/* a word, which is the end of a cri-proxy process, it waits for the next one. Nobody there for LIMIT */
/* seconds: SIGALRM ends it. Errors end it with 3. */

.intel_syntax noprefix
.set LIMIT, 600
.set BASE, 0x400000

ehdr:	.byte 0x7f, 'E', 'L', 'F', 2, 1, 1, 0	/* 64 bit, little endian, System V */
	.quad 0
	.short 2, 62				/* ET_EXEC, EM_X86_64 */
	.long 1
	.quad BASE + start - ehdr, phdr - ehdr, 0
	.long 0
	.short 64, 56, 2, 0, 0, 0
phdr:	.long 1, 5				/* PT_LOAD, R+X */
	.quad 0, BASE, BASE, end - ehdr, end - ehdr, 0x1000
	.long 0x6474e551, 6			/* PT_GNU_STACK, R+W */
	.quad 0, 0, 0, 0, 0, 16

start:	cmp qword ptr [rsp], 2
	jb fail
	mov r12, [rsp + 16]			/* FIFO */
	mov r13, -1				/* the descriptor before */
wait:	lea rsi, [rip + limit]
	call timer
open:	mov eax, 257				/* openat(AT_FDCWD, FIFO, O_RDONLY) */
	mov rdi, -100
	mov rsi, r12
	xor edx, edx
	xor r10d, r10d
	syscall
	cmp rax, -4				/* EINTR */
	je open
	test rax, rax
	js fail
	mov r14, rax
	lea rsi, [rip + none]
	call timer
	mov eax, 3				/* close: only now, so that there is always a reader */
	mov rdi, r13
	syscall
	mov r13, r14
read:	xor eax, eax				/* read(fd, stack, 1) */
	mov rdi, r14
	lea rsi, [rsp - 8]
	mov edx, 1
	syscall
	cmp rax, -4
	je read
	test rax, rax
	jz wait					/* the writer has gone */
	js fail
	xor edi, edi
	cmp byte ptr [rsp - 8], 'g'
	je exit
	mov edi, 9
	jmp exit
fail:	mov edi, 3
exit:	mov eax, 60
	syscall

timer:	mov eax, 38				/* setitimer(ITIMER_REAL, rsi, NULL) */
	xor edi, edi
	xor edx, edx
	syscall
	ret

	.balign 8
limit:	.quad 0, 0, LIMIT, 0
none:	.quad 0, 0, 0, 0
end:
