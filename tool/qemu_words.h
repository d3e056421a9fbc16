#pragma once
// Commands, options and values of QEMU's tools that qcow does not have, and what replaces them.

#include <optional>
#include <span>
#include <string_view>

namespace tool {

struct QemuWord {
    std::string_view command;  // of an option: the command of qcow that it was given to; empty: any; "-o": a name in -o
    std::string_view words;    // commands, options or values, separated by spaces
    std::string_view instead;  // what replaces them
};

std::span<const QemuWord> qemu_commands();
std::span<const QemuWord> qemu_options();
std::span<const QemuWord> qemu_values();

/// Each returns what replaces the word, or nothing if QEMU does not have the word.
std::optional<std::string_view> qemu_command(std::string_view name);
std::optional<std::string_view> qemu_option(std::string_view command, std::string_view option);
std::optional<std::string_view> qemu_value(std::string_view value);

}  // namespace tool
