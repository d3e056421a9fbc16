#pragma once
// Changing parts of a header without losing the others.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "format/header.h"

namespace qcow::format {

/// The first cluster of an image, parts of which change. Everything else stays, byte for byte: extensions that nobody
/// knows, the order of all extensions, their padding, fields behind those that are known, and what lies behind the
/// header.
class HeaderEdit {
public:
    /// `cluster`: the first cluster, as much of it as the file has. parse_header has accepted it.
    explicit HeaderEdit(std::span<const std::byte> cluster);

    /// Changes the fields that update_header changes.
    void set_state(const HeaderState& state);
    /// Changes the version. Version 3 has the same as version 2, and no features. Version 2 leaves out the fields that
    /// it does not have: nothing depends on them.
    void set_version(unsigned version);
    /// Of version 3: the logarithm of the bits of a refcount.
    void set_refcount_order(unsigned order);
    /// Of version 3: the field alone. The feature bit that belongs to it is a part of the state.
    void set_compression(Compression compression);
    /// Changes what the first extension of this type holds, and removes further ones. If there is none, a new one comes
    /// behind the last extension.
    void set_extension(ExtensionType type, std::span<const std::byte> data);
    void remove_extension(ExtensionType type);
    /// An empty name: the image has no backing file.
    void set_backing_name(std::string_view name);

    /// Returns what to write at host offset 0, one after the other, each in full sectors of 512 bytes. Each is durable
    /// before the next is written. Whatever sectors of them a crash leaves out, parse_header then finds the header as
    /// it was, or the new one: a step changes the first sector alone, or bytes that no reader looks at.
    ///
    /// Two kinds of headers do not have the room for that: those of version 2, and those of version 3 that end in front
    /// of byte 112 or nearly fill their cluster. They change in one step, which is safe if the file system or the disk
    /// writes 4 KiB at once.
    ///
    /// Leaves out the table of feature names if the rest does not fit in a cluster with it.
    /// Errors: Errc::limit_exceeded if header, extensions and name do not fit without it either.
    [[nodiscard]] Result<std::vector<std::vector<std::byte>>> steps() const;

private:
    struct Record {
        std::uint32_t type = 0;
        std::vector<std::byte> bytes;  // type, length, data and padding
    };

    [[nodiscard]] std::vector<std::byte> tail() const;
    void lead_to_tail(std::span<std::byte> cluster, std::size_t at) const;

    std::vector<std::byte> before_;  // in full sectors
    std::vector<std::byte> fields_;  // as far as the header's length says
    std::vector<Record> records_;
    std::vector<std::byte> name_;
    std::size_t cluster_size_;
    std::size_t end_;  // of what belongs to the header in `before_`
};

}  // namespace qcow::format
