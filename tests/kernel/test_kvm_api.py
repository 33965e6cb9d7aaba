"""hyper/kvm with raw guests on whatever /dev/kvm there is, also one that only emulates: each guest is a few instructions."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hyper.kvm import api, state
from hyper.kvm.errors import KvmError, Lacking
from hyper.kvm.memory import MADV_DONTNEED, PAGE, Memory, set_bits
from hyper.kvm.probe import problem
from hyper.kvm.stats import stats
from hyper.kvm.system import Kvm
from hyper.kvm.vcpu import Vcpu
from tests.kvmkit import ENTRY, SIZE, Guest, outputs
from tests.needs import machine_kind

pytestmark = pytest.mark.needs("kvm-device")

OUT_AL_HLT = """
    ba f8 03 00 00      ; mov edx, 0x3f8
    ee                  ; out dx, al
    f4                  ; hlt
"""


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def count(fd: int) -> int:
    """What an eventfd has counted since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class Runner:
    """Runs a vCPU in a thread of its own until `stop`; exits go to `serve`, KVM_EXIT_INTR goes round."""

    def __init__(self, vcpu: Vcpu, serve: Callable[[int], bool]) -> None:
        self.vcpu, self.serve = vcpu, serve
        self.stopping = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.stopping:
                reason = self.vcpu.run()
                if reason != api.KVM_EXIT_INTR and not self.serve(reason):
                    return
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive(), "the vCPU does not come back"
        assert self.error is None

    def stop(self) -> None:
        self.stopping = True
        self.vcpu.kick()
        self.join()


# modes, ports, memory


def test_real_mode_adds_and_writes() -> None:
    with Guest() as guest:
        vcpu = guest.real("""
            b8 02 00            ; mov ax, 2
            05 05 00            ; add ax, 5
            04 30               ; add al, '0'
            ba f8 03            ; mov dx, 0x3f8
            ee                  ; out dx, al
            ef                  ; out dx, ax
            f4                  ; hlt
        """)
        assert outputs(vcpu) == [b"7", b"7\0"]
        assert vcpu.regs.rip == ENTRY + 14


def test_protected_mode_is_32_bits_wide() -> None:
    with Guest() as guest:
        vcpu = guest.protected("""
            b8 ff ff ff ff      ; mov eax, 0xffffffff
            83 e8 0e            ; sub eax, 14
            ba f8 03 00 00      ; mov edx, 0x3f8
            ef                  ; out dx, eax
            f4                  ; hlt
        """)
        assert outputs(vcpu) == [struct.pack("<I", 0xFFFFFFF1)]
        assert vcpu.sregs.cr0 & 1


def test_long_mode_is_64_bits_wide() -> None:
    with Guest() as guest:
        vcpu = guest.long("""
            48 b8 88 77 66 55 44 33 22 11   ; mov rax, 0x1122334455667788
            49 89 c0                        ; mov r8, rax
            49 c1 e8 20                     ; shr r8, 32
            44 89 c0                        ; mov eax, r8d
            ba f8 03 00 00                  ; mov edx, 0x3f8
            ef                              ; out dx, eax
            f4                              ; hlt
        """)
        assert outputs(vcpu) == [bytes.fromhex("44332211")]
        assert vcpu.regs.r8 == 0x11223344 and vcpu.sregs.efer & 0x400, "LMA"


def test_ports_are_read() -> None:
    with Guest() as guest:
        vcpu = guest.real("""
            ba f8 03            ; mov dx, 0x3f8
            ec                  ; in al, dx
            04 01               ; add al, 1
            ee                  ; out dx, al
            f4                  ; hlt
        """)
        assert outputs(vcpu, inputs=lambda length: b"A" * length) == [b"B"]


def test_string_io_moves_all_bytes() -> None:
    """How many a single exit has is the kernel's choice; all of them arrive, in order, both ways."""
    answer = iter(b"hello")
    with Guest() as guest:
        vcpu = guest.real("""
            fc                  ; cld
            bf 00 20            ; mov di, 0x2000
            b9 05 00            ; mov cx, 5
            ba f8 03            ; mov dx, 0x3f8
            f3 6c               ; rep insb
            be 00 20            ; mov si, 0x2000
            b9 05 00            ; mov cx, 5
            f3 6e               ; rep outsb
            f4                  ; hlt
        """)
        assert b"".join(outputs(vcpu, inputs=lambda n: bytes(next(answer) for _ in range(n)))) == b"hello"
        assert bytes(guest.memory.view[0x2000:0x2005]) == b"hello"


def test_mmio_is_read_and_written() -> None:
    with Guest() as guest:
        vcpu = guest.protected("""
            a1 08 00 00 d0      ; mov eax, [0xd0000008]
            83 c0 01            ; add eax, 1
            a3 0c 00 00 d0      ; mov [0xd000000c], eax
            88 05 10 00 00 d0   ; mov [0xd0000010], al
            f4                  ; hlt
        """)
        assert vcpu.run() == api.KVM_EXIT_MMIO
        assert (vcpu.exit.mmio.phys_addr, vcpu.exit.mmio.len, vcpu.exit.mmio.is_write) == (0xD0000008, 4, 0)
        vcpu.mmio_data()[:] = struct.pack("<I", 41)
        assert vcpu.run() == api.KVM_EXIT_MMIO
        assert (vcpu.exit.mmio.phys_addr, vcpu.exit.mmio.is_write) == (0xD000000C, 1)
        assert bytes(vcpu.mmio_data()) == struct.pack("<I", 42)
        assert vcpu.run() == api.KVM_EXIT_MMIO
        assert bytes(vcpu.mmio_data()) == b"\x2a"
        assert vcpu.run() == api.KVM_EXIT_HLT


# exceptions

SAY = """
    ba f8 03 00 00      ; mov edx, 0x3f8
    b0 {}               ; mov al, ..
    ee                  ; out dx, al
"""
RETURN = """
    58                  ; pop eax: by hand, because a KVM that emulates does not know iret
    {}
    59                  ; pop ecx: cs
    9d                  ; popf
    ff e0               ; jmp eax
"""


def test_an_exception_goes_to_the_guests_handler() -> None:
    """#UD has no error code, #GP has one; each handler says which it is and what it finds on its stack."""
    with Guest() as guest:
        guest.on_vector(6, SAY.format("06") + RETURN.format("83 c0 02 ; add eax, 2: behind ud2"), 0x3000)
        guest.on_vector(13, "58 ba f8 03 00 00 ef f4 ; pop eax (the error code); mov edx, 0x3f8; out dx, eax; hlt", 0x3100)
        vcpu = guest.protected("""
            0f 0b               ; ud2
            66 b8 50 00         ; mov ax, 0x50
            8e d8               ; mov ds, ax (beyond the GDT)
            f4                  ; hlt
        """)
        assert outputs(vcpu) == [b"\x06", struct.pack("<I", 0x50)]


def test_a_triple_fault_is_a_shutdown() -> None:
    with Guest() as guest:
        vcpu = guest.protected("0f 0b ; ud2")
        sregs = vcpu.sregs
        sregs.idt.limit = 0
        vcpu.set_sregs(sregs)
        assert vcpu.run() == api.KVM_EXIT_SHUTDOWN
        assert vcpu.describe_exit().startswith("shutdown at rip 0x")


# interrupts and event descriptors

WAIT_FOR_INTERRUPT = """
    b0 ff                           ; mov al, 0xff
    e6 21                           ; out 0x21, al: PIC off, which has the same pins
    c7 05 f0 00 e0 fe ff 01 00 00   ; mov dword [0xfee000f0], 0x1ff: LAPIC on
    c7 05 00 00 c0 fe 18 00 00 00   ; mov dword [0xfec00000], 0x18: IOAPIC, low word of pin 4
    c7 05 10 00 c0 fe 30 00 00 00   ; mov dword [0xfec00010], 0x30: vector 0x30, edge, unmasked
    b0 01                           ; mov al, 1
    ba f8 03 00 00                  ; mov edx, 0x3f8
    ee                              ; out dx, al: ready
    fb                              ; 1: sti
    f4                              ; hlt
    eb fc                           ; jmp 1b
"""
END_OF_INTERRUPT = "c7 05 b0 00 e0 fe 00 00 00 00 ; mov dword [0xfee000b0], 0"


def test_an_irqfd_interrupts_a_halted_guest() -> None:
    said: list[bytes] = []
    ready, interrupted = threading.Event(), threading.Event()
    with Guest(irqchip=True) as guest, eventfd() as line:
        guest.on_vector(0x30, END_OF_INTERRUPT + SAY.format("02") + RETURN.format(""), 0x3000)
        vcpu = guest.protected(WAIT_FOR_INTERRUPT)
        guest.vm.irqfd(line, 4)

        def serve(reason: int) -> bool:
            assert reason == api.KVM_EXIT_IO, vcpu.describe_exit()
            said.append(bytes(vcpu.io_data()))
            (ready if len(said) == 1 else interrupted).set()
            return True

        runner = Runner(vcpu, serve)
        try:
            assert ready.wait(20)
            for _ in range(2):
                interrupted.clear()
                os.eventfd_write(line, 1)
                assert interrupted.wait(20)
            guest.vm.remove_irqfd(line, 4)
            interrupted.clear()
            os.eventfd_write(line, 1)
            assert count(line) == 1, "an eventfd that was removed is read by nobody"
            guest.vm.irq_line(4, 1)
            guest.vm.irq_line(4, 0)
            assert interrupted.wait(20)
        finally:
            runner.stop()
    assert said == [b"\x01", b"\x02", b"\x02", b"\x02"]


def test_ioeventfds_swallow_what_they_match() -> None:
    """Ports and MMIO, with and without datamatch: what matches counts and does not stop the vCPU, what does not stops it."""
    with Guest() as guest, eventfd() as port, eventfd() as any_port, eventfd() as mmio, eventfd() as matched:
        vcpu = guest.protected("""
            b0 07               ; mov al, 7
            e6 80               ; out 0x80, al: matches
            b0 08               ; mov al, 8
            e6 80               ; out 0x80, al: does not
            e6 81               ; out 0x81, al: any does
            b0 09               ; mov al, 9
            e6 81               ; out 0x81, al
            b8 03 00 00 00      ; mov eax, 3
            a3 50 00 00 d0      ; mov [0xd0000050], eax: any does
            a3 64 00 00 d0      ; mov [0xd0000064], eax: matches
            b8 04 00 00 00      ; mov eax, 4
            a3 64 00 00 d0      ; mov [0xd0000064], eax: does not
            f4                  ; hlt
        """)
        guest.vm.ioeventfd(port, 0x80, 1, datamatch=7, pio=True)
        guest.vm.ioeventfd(any_port, 0x81, 1, pio=True)
        guest.vm.ioeventfd(mmio, 0xD0000050, 4)
        guest.vm.ioeventfd(matched, 0xD0000064, 4, datamatch=3)
        assert vcpu.run() == api.KVM_EXIT_IO and vcpu.exit.io.port == 0x80 and bytes(vcpu.io_data()) == b"\x08"
        assert vcpu.run() == api.KVM_EXIT_MMIO and vcpu.exit.mmio.phys_addr == 0xD0000064
        assert bytes(vcpu.mmio_data()) == struct.pack("<I", 4)
        assert vcpu.run() == api.KVM_EXIT_HLT
        assert [count(fd) for fd in (port, any_port, mmio, matched)] == [1, 2, 1, 1]


def test_a_removed_ioeventfd_is_an_exit_again() -> None:
    with Guest() as guest, eventfd() as fd:
        vcpu = guest.real("""
            e6 80               ; out 0x80, al
            e6 80               ; out 0x80, al
            f4                  ; hlt
        """)
        guest.vm.ioeventfd(fd, 0x80, 1, pio=True)
        with pytest.raises(KvmError, match=r"KVM_IOEVENTFD \(1 bytes at port 0x80\): File exists"):
            guest.vm.ioeventfd(fd, 0x80, 1, pio=True)
        guest.vm.remove_ioeventfd(fd, 0x80, 1, pio=True)
        assert outputs(vcpu, 0x80) == [b"\0", b"\0"]
        assert count(fd) == 0


# memory slots


def test_dirty_log_has_the_pages_that_were_written() -> None:
    with Guest() as guest:
        vcpu = guest.protected("""
            a0 10 50 00 00      ; mov al, [0x5010]
            a0 00 60 00 00      ; mov al, [0x6000]
            a2 00 70 10 00      ; mov [0x107000], al
            f4                  ; hlt
            a2 10 50 00 00      ; mov [0x5010], al
            a0 00 60 00 00      ; mov al, [0x6000]
            f4                  ; hlt
        """)
        guest.vm.log_dirty(0, True)
        assert vcpu.run() == api.KVM_EXIT_HLT
        log = guest.vm.dirty_log(0)
        assert len(log) * 8 == SIZE // PAGE
        first = {page for start, end in set_bits(log) for page in range(start, end)}
        assert {0x107} <= first <= {1, 5, 6, 0x107}, "the written page, and perhaps those that were read"
        assert vcpu.run() == api.KVM_EXIT_HLT
        assert list(set_bits(guest.vm.dirty_log(0))) == [(5, 6)], "the log starts again with each look"
        guest.vm.log_dirty(0, False)
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG \(slot 0\): No such file"):
            guest.vm.dirty_log(0)


def test_a_readonly_slot_is_read_without_an_exit_and_written_with_one() -> None:
    with Guest() as guest, Memory(PAGE) as page:
        guest.vm.add_memory(1, 0xD0000000, page, readonly=True)
        page.view[0:4] = b"virt"
        vcpu = guest.protected("""
            a1 00 00 00 d0      ; mov eax, [0xd0000000]
            ba f8 03 00 00      ; mov edx, 0x3f8
            ef                  ; out dx, eax
            a3 70 00 00 d0      ; mov [0xd0000070], eax
            a1 70 00 00 d0      ; mov eax, [0xd0000070]
            ef                  ; out dx, eax
            f4                  ; hlt
        """)
        assert vcpu.run() == api.KVM_EXIT_IO and bytes(vcpu.io_data()) == b"virt"
        assert vcpu.run() == api.KVM_EXIT_MMIO
        assert (vcpu.exit.mmio.phys_addr, vcpu.exit.mmio.is_write) == (0xD0000070, 1)
        assert bytes(vcpu.mmio_data()) == b"virt" and bytes(page.view[0x70:0x74]) == bytes(4), "written by nobody but us"
        page.view[0x70:0x74] = b"done"
        assert outputs(vcpu) == [b"done"]


def test_a_removed_slot_is_mmio_again() -> None:
    with Guest() as guest, Memory(PAGE) as page:
        page.view[:4] = b"here"
        vcpu = guest.protected("a1 00 00 00 d0 f4 a1 00 00 00 d0 f4 ; (mov eax, [0xd0000000]; hlt) twice")
        guest.vm.add_memory(1, 0xD0000000, page)
        assert vcpu.run() == api.KVM_EXIT_HLT and vcpu.regs.rax == int.from_bytes(b"here", "little")
        guest.vm.remove_memory(1)
        guest.vm.remove_memory(1)
        assert vcpu.run() == api.KVM_EXIT_MMIO


def test_memory_of_a_file_shared_and_private() -> None:
    """What the guest writes reaches the file of a shared mapping and leaves that of a private one alone."""
    code = "c6 05 00 20 00 00 58 f4 ; mov byte [0x2000], 'X'; hlt"
    for shared, expected in ((True, b"X"), (False, b"\0")):
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, SIZE)
            with Guest(memory=Memory.of_file(fd, SIZE, shared=shared)) as guest:
                assert guest.protected(code).run() == api.KVM_EXIT_HLT
                assert guest.memory.view[0x2000] == ord("X")
            assert os.pread(fd, 1, 0x2000) == expected
        finally:
            os.close(fd)


def test_discarded_memory_reads_as_zeros() -> None:
    for memory in (Memory(SIZE), Memory.memfd(SIZE)):
        with memory, Guest(memory=memory) as guest:
            guest.put(0x100000, b"old")
            memory.discard(0x100000, PAGE)
            vcpu = guest.protected("a1 00 00 10 00 f4 ; mov eax, [0x100000]; hlt")
            assert vcpu.run() == api.KVM_EXIT_HLT and vcpu.regs.rax == 0


# stopping

FOREVER = "eb fe ; jmp ."


def test_a_kick_before_the_run_runs_nothing() -> None:
    with Guest() as guest:
        vcpu = guest.protected(OUT_AL_HLT)
        vcpu.kick()
        assert vcpu.run() == api.KVM_EXIT_INTR
        assert vcpu.regs.rip == ENTRY
        assert outputs(vcpu) == [b"\0"], "it is over with the exit that it caused"


def test_a_kick_finishes_the_instruction_that_waits_for_us() -> None:
    with Guest() as guest:
        vcpu = guest.real("e4 80 f4 ; in al, 0x80; hlt")
        assert vcpu.run() == api.KVM_EXIT_IO
        vcpu.io_data()[:] = b"\x55"
        with pytest.raises(ValueError, match="middle of an instruction"):
            state.save_vcpu(vcpu, [])
        vcpu.kick()
        assert vcpu.run() == api.KVM_EXIT_INTR
        assert (vcpu.regs.rax & 0xFF, vcpu.regs.rip) == (0x55, ENTRY + 2)


@pytest.mark.parametrize("code,irqchip", [(FOREVER, False), ("f4 ; hlt", True)], ids=["busy", "halted"])
def test_a_kick_from_another_thread(code: str, irqchip: bool) -> None:
    """Twenty times, whether the vCPU is in the guest, in the kernel or on its way."""
    with Guest(irqchip=irqchip) as guest:
        vcpu = guest.protected(code)
        asked, answered = threading.Semaphore(0), threading.Semaphore(0)
        reasons = []

        def loop() -> None:
            for _ in range(20):
                asked.acquire()
                reasons.append(vcpu.run())
                answered.release()

        thread = threading.Thread(target=loop)
        thread.start()
        for _ in range(20):
            asked.release()
            vcpu.kick()
            assert answered.acquire(timeout=20), "a kick was lost"
        thread.join(20)
    assert reasons == [api.KVM_EXIT_INTR] * 20


def test_kicking_a_vcpu_whose_thread_has_ended_is_harmless() -> None:
    with Guest() as guest:
        vcpu = guest.protected("f4 f4 ; hlt; hlt")
        thread = threading.Thread(target=vcpu.run)
        thread.start()
        thread.join(20)
        vcpu.kick()
        assert vcpu.run() == api.KVM_EXIT_INTR
        assert vcpu.run() == api.KVM_EXIT_HLT


# several vCPUs


def test_two_vcpus_share_the_memory() -> None:
    """Each adds 50 to one counter, with locks; each says when it is done."""
    code = """
        b9 32 00 00 00          ; mov ecx, 50
        f0 ff 05 00 20 00 00    ; 1: lock inc dword [0x2000]
        49                      ; dec ecx
        75 f6                   ; jnz 1b
        f4                      ; hlt
    """
    with Guest() as guest:
        vcpus = [guest.protected(code), guest.protected(code)]
        runners = [Runner(vcpu, lambda reason: reason != api.KVM_EXIT_HLT) for vcpu in vcpus]
        for runner in runners:
            runner.join()
        assert int.from_bytes(guest.memory.view[0x2000:0x2004], "little") == 100


def test_the_first_vcpu_starts_the_second() -> None:
    """INIT and SIPI through the LAPIC: the second wakes in real mode at the page that the vector names."""
    said: list[bytes] = []
    told = threading.Event()
    with Guest(irqchip=True) as guest:
        first = guest.protected("""
            c7 05 f0 00 e0 fe ff 01 00 00   ; mov dword [0xfee000f0], 0x1ff: LAPIC on
            c7 05 10 03 e0 fe 00 00 00 01   ; mov dword [0xfee00310], 1 << 24: to APIC 1
            c7 05 00 03 e0 fe 00 45 00 00   ; mov dword [0xfee00300], 0x4500: INIT
            c7 05 00 03 e0 fe 05 46 00 00   ; mov dword [0xfee00300], 0x4605: SIPI, page 5
            f4                              ; hlt
        """)
        guest.put(0x5000, bytes.fromhex("b0 2b e6 80 f4"))  # mov al, 0x2b; out 0x80, al; hlt
        second = guest.vcpu()
        assert second.mp_state == api.KVM_MP_STATE_UNINITIALIZED

        def serve(reason: int) -> bool:
            assert reason == api.KVM_EXIT_IO, second.describe_exit()
            said.append(bytes(second.io_data()))
            told.set()
            return True

        runners = [Runner(second, serve), Runner(first, lambda reason: False)]
        try:
            assert told.wait(20)
        finally:
            for runner in runners:
                runner.stop()
        assert said == [b"\x2b"]
        assert second.sregs.cs.base == 0x5000


# state

COUNTING = """
    b9 76 01 00 00          ; mov ecx, 0x176: SYSENTER_EIP
    b8 2a 00 00 00          ; mov eax, 42
    31 d2                   ; xor edx, edx
    0f 30                   ; wrmsr
    31 db                   ; xor ebx, ebx
    43                      ; 1: inc ebx
    ff 05 00 20 00 00       ; inc dword [0x2000]
    88 d8                   ; mov al, bl
    e6 80                   ; out 0x80, al
    83 fb 06                ; cmp ebx, 6
    75 f0                   ; jne 1b
    0f 32                   ; rdmsr
    e6 80                   ; out 0x80, al
    f4                      ; hlt
"""


def test_a_vcpu_goes_on_in_another_vm() -> None:
    """Stopped in mid-run, saved, restored into a second VM with a copy of the memory: nothing is lost or runs twice."""
    with Guest() as old:
        vcpu = old.protected(COUNTING)
        said = []
        for _ in range(3):
            assert vcpu.run() == api.KVM_EXIT_IO
            said.append(bytes(vcpu.io_data()))
        vcpu.kick()
        assert vcpu.run() == api.KVM_EXIT_INTR
        saved = state.save_vcpu(vcpu, old.kvm.msr_indices())
        memory = bytes(old.memory.view)
    with Guest() as new:
        new.put(0, memory)
        restored = new.vm.create_vcpu(0)
        new.vcpus.append(restored)
        state.restore_vcpu(restored, saved)
        said += outputs(restored, 0x80)
        assert new.memory.view[0x2000] == 6
    assert said == [b"\x01", b"\x02", b"\x03", b"\x04", b"\x05", b"\x06", b"\x2a"]


def test_all_state_comes_back_as_it_was() -> None:
    """Bytes of XSAVE, debug registers, a LAPIC with an armed deadline, an IOAPIC, the PIT, the clock."""
    with Guest(irqchip=True) as old, Guest(irqchip=True) as new:
        for guest in (old, new):
            guest.vm.create_pit()
        vcpu, second = old.protected(WAIT_FOR_INTERRUPT), old.vcpu()
        cpuid = [e._replace(ecx=e.ecx | 1 << 24) if e.function == 1 else e for e in vcpu.cpuid]
        vcpu.set_cpuid(cpuid)  # bit 24: a TSC deadline timer, which KVM leaves to us
        assert vcpu.run() == api.KVM_EXIT_IO
        vcpu.kick()
        assert vcpu.run() == api.KVM_EXIT_INTR
        lapic = vcpu.lapic
        lapic.regs[0x322] = 0x04  # LVT timer: deadline mode
        vcpu.set_lapic(lapic)
        vcpu.set_msrs({api.MSR_IA32_TSC_DEADLINE: 1 << 62})
        xsave = bytearray(vcpu.xsave)
        xsave[160:176] = bytes(range(16))  # xmm0
        xsave[512] |= 3  # XSTATE_BV: x87 and SSE
        vcpu.set_xsave(bytes(xsave))
        debugregs = vcpu.debugregs
        debugregs.db[0] = 0x1234
        vcpu.set_debugregs(debugregs)
        indices = old.kvm.msr_indices()
        saved = state.save_machine(old.vm, [vcpu, second], indices)
        first = saved["vcpus"][0]
        assert first["msrs"]["0x6e0"] == 1 << 62 and first["cpuid"] == [list(entry) for entry in cpuid]

        new.vcpus += [new.vm.create_vcpu(0), new.vm.create_vcpu(1)]
        state.restore_machine(new.vm, new.vcpus, saved)
        again = state.save_machine(new.vm, new.vcpus, indices)
        restored = new.vcpus[0]
        assert restored.xsave[160:176] == bytes(range(16)) and restored.debugregs.db[0] == 0x1234
        assert again["vm"].pop("clock") >= saved["vm"].pop("clock"), "kvmclock went back"
        assert without_load_times(again["vm"].pop("pit")) == without_load_times(saved["vm"].pop("pit"))
        assert again["vm"] == saved["vm"]
        offsets = [[vcpu.pop("tsc_offset") for vcpu in machine["vcpus"]] for machine in (saved, again)]
        assert offsets[0][1] - offsets[0][0] == offsets[1][1] - offsets[1][0], "the vCPUs' counters drift apart"
        for before, after in zip(saved["vcpus"], again["vcpus"], strict=True):
            assert after["msrs"].pop("0x10") >= before["msrs"].pop("0x10"), "the time stamp counter went back"
            changed = {name for name, value in before["msrs"].items() if after["msrs"].pop(name) != value}
            assert changed <= {"0x40000010", "0x40000020"} and not after["msrs"], "more than Hyper-V's running counters"
            assert {**after, "msrs": before["msrs"]} == before


def without_load_times(pit: str) -> bytes:
    """Three channels of kvm_pit_channel_state; at 16 is when the count was loaded, which a restore does anew."""
    state = bytearray.fromhex(pit)
    for channel in range(3):
        state[24 * channel + 16 : 24 * channel + 24] = bytes(8)
    return bytes(state)


def test_damaged_state_is_refused() -> None:
    with Guest(irqchip=True) as guest:
        vcpu = guest.protected(OUT_AL_HLT)
        saved = state.save_vcpu(vcpu, guest.kvm.msr_indices())
        with pytest.raises(ValueError, match=r"kvm_sregs of 311 bytes, not 312"):
            state.restore_vcpu(vcpu, {**saved, "sregs": saved["sregs"][:-2]})
        with pytest.raises(ValueError, match="4095 bytes of XSAVE"):
            state.restore_vcpu(vcpu, {**saved, "xsave": saved["xsave"][: 2 * 4095]})
        with pytest.raises(KvmError, match=r"KVM_SET_MSRS \(vCPU 0, MSR 0xdeadbeef to 0x1\)"):
            state.restore_vcpu(vcpu, {**saved, "msrs": {"0xdeadbeef": 1}})
        with pytest.raises(ValueError, match="other interrupt controllers"):
            state.restore_vm(guest.vm, {"clock": 0, "irqchips": None, "pit": None}, [vcpu])
        with pytest.raises(ValueError, match="of 2 vCPUs, not of 1"):
            state.restore_machine(guest.vm, [vcpu], {"vcpus": [saved, saved]})


# figures, capabilities, errors


def test_statistics_count_exits() -> None:
    with Guest() as guest:
        vcpu = guest.real("e6 80 e6 80 e6 80 f4 ; out 0x80, al three times; hlt")
        fd, vm_fd = vcpu.stats_fd(), guest.vm.stats_fd()
        try:
            before = stats(fd)
            outputs(vcpu, 0x80)
            after = stats(fd)
            assert after["exits"] - before["exits"] >= 4
            assert after["halt_poll_success_hist"] == 0, "a histogram is one figure"
            assert "remote_tlb_flush" in stats(vm_fd)
        finally:
            os.close(fd)
            os.close(vm_fd)


def test_the_device_tells_what_it_can_do() -> None:
    with Kvm() as kvm:
        assert kvm.check(api.KVM_CAP_USER_MEMORY) == 1 and kvm.check(api.KVM_CAP_NR_MEMSLOTS) > 32
        assert kvm.check(9999) == 0
        kvm.require(api.KVM_CAP_IRQFD, api.KVM_CAP_IMMEDIATE_EXIT)
        leaves = {entry.function: entry for entry in kvm.supported_cpuid()}
        assert struct.pack("<III", leaves[0].ebx, leaves[0].edx, leaves[0].ecx) in (b"AuthenticAMD", b"GenuineIntel")
        assert 0x174 in kvm.msr_indices(), "SYSENTER_CS"
        missing = next(capability for capability in api.CAPABILITIES if not kvm.check(capability))
        with pytest.raises(Lacking, match=api.CAPABILITIES[missing]):
            kvm.require(missing)


def test_errors_name_the_call_and_the_object() -> None:
    with pytest.raises(FileNotFoundError):
        Kvm("/dev/kvm-that-is-not-there")
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION: Inappropriate ioctl"):
        Kvm("/dev/null")
    with Guest(irqchip=True) as guest:
        guest.vcpu()
        with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU \(vCPU 0\): File exists"):
            guest.vm.create_vcpu(0)
        with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP: File exists"):
            guest.vm.create_irqchip()
        with pytest.raises(KvmError, match=r"slot 1, 4096 bytes at 0x1000\): File exists"):
            guest.vm.add_memory(1, 0x1000, guest.memory, size=PAGE)
        with pytest.raises(KvmError, match="slot 1: 4096 bytes at 2097152 of 2097152"):
            guest.vm.add_memory(1, SIZE, guest.memory, SIZE, size=PAGE)
        assert list(guest.vm.slots) == [0]


def test_descriptors_are_closed_once() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    guest = Guest()
    vcpu = guest.vcpu()
    page = vcpu.page[:8]
    for _ in range(2):
        with guest:
            pass
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert bytes(page[:1]) == b"\0", "a view outlives its vCPU"


def test_a_view_outlives_its_memory() -> None:
    memory = Memory(SIZE)
    view = memory.view[PAGE : PAGE + 3]
    view[:] = b"abc"
    memory.close()
    memory.close()
    assert bytes(view) == b"abc"
    with pytest.raises(ValueError):
        memory.view[0]


def test_memory_is_aligned_and_refuses_nonsense() -> None:
    with Memory(3 * PAGE) as memory:
        assert memory.address % (2 << 20) == 0
        memory.advise(MADV_DONTNEED)
        with pytest.raises(OSError, match="are not inside of"):
            memory.advise(MADV_DONTNEED, PAGE, 3 * PAGE)
    with pytest.raises(OSError, match="neither may cut a page"):
        Memory(100)
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        with pytest.raises(OSError, match="of 8192 bytes at 0 of a file of 4096"):
            Memory.of_file(fd, 2 * PAGE, shared=False)
        with Memory.of_file(fd, PAGE, shared=True, readonly=True) as memory, pytest.raises(TypeError):
            memory.view[0] = 1
    finally:
        os.close(fd)


def test_the_documents_example_runs_as_it_stands() -> None:
    root = Path(__file__).parents[2]
    example = (root / "docs" / "kvm.md").read_text().split("```python\n")[1].split("```")[0]
    ran = subprocess.run([sys.executable, "-c", example], check=False, cwd=root, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "7\n", "")
    assert len(example[example.index("with Kvm") :].splitlines()) <= 10


def test_the_probe_tells_true_kvm_from_the_rest() -> None:
    assert problem("/dev/kvm-that-is-not-there") == "there is no /dev/kvm-that-is-not-there"
    assert problem("/dev/null") == "/dev/null cannot run a guest: KVM_GET_API_VERSION: Inappropriate ioctl for device"
    found = problem()
    if machine_kind() == "tcg":
        assert found and found.startswith("/dev/kvm only emulates: ")
    else:
        assert found is None
