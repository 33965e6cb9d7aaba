"""The words of the guest kernel's command line; hyper/README.md has what each is for and what it saves."""

from __future__ import annotations

from hyper.vm.hardware import Hardware

WORDS = (  # measured, see hyper/README.md: they shorten the boot and change nothing for the workload
    "quiet", "reboot=t", "panic=-1", "console=ttyS0", "no_timer_check", "tsc=reliable", "8250.nr_uarts=1",
    "i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd", "cryptomgr.notests", "random.trust_cpu=on",
    "rcupdate.rcu_expedited=1", "pci=off",
    # Memory that comes later is used at once, most of it so that it can be taken back.
    "memhp_default_state=online", "memory_hotplug.online_policy=auto-movable",
)  # fmt: skip
WORDS_TCG = ("mitigations=off", "init_on_alloc=0")  # on a true CPU the guest's kernel keeps its guards
NO_TRACING = "initcall_blacklist=tracer_init_tracefs"  # TCG alone: 0.1 s for some ten thousand files of tracefs


def command_line(hardware: Hardware) -> str:
    """The kernel's words."""
    words = [*WORDS, f"tsc_early_khz={hardware.tsc_khz}"]
    if not hardware.kvm:
        words += WORDS_TCG if hardware.tracing else (*WORDS_TCG, NO_TRACING)
    if hardware.vcpus == 1:
        words.append("noreplace-smp")
    return " ".join((*words, *hardware.words))
