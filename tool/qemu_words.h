#pragma once
// The words of QEMU's tools that this one does not have, and what does their job today.

#include <optional>
#include <span>
#include <string_view>

namespace tool {

struct QemuWord {
    std::string_view command;  // of options: the command of qcow that would have it; empty: any; "-o": a name in -o
    std::string_view words;    // commands, options or values, separated by spaces
    std::string_view instead;  // what does the job
};

std::span<const QemuWord> qemu_commands();
std::span<const QemuWord> qemu_options();
std::span<const QemuWord> qemu_values();

/// What to do instead; nothing where the word is not QEMU's.
std::optional<std::string_view> qemu_command(std::string_view name);
std::optional<std::string_view> qemu_option(std::string_view command, std::string_view option);
std::optional<std::string_view> qemu_value(std::string_view value);

}  // namespace tool
