#pragma once
// Sound images, and single changes that damage them.

#include <fmt/format.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "base/endian.h"
#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {

/// One change of a sound image.
struct Damage {
    std::string name;
    std::uint64_t at = 0;
    unsigned width = 8;  // bytes
    std::uint64_t value = 0;
};

/// An image as bytes, with its structures found in it. This knows the format by itself: it must not share the errors
/// of what it tests.
class SoundImage {
public:
    static constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00;

    explicit SoundImage(std::string bytes) : bytes_(std::move(bytes)) {}

    [[nodiscard]] const std::string& bytes() const { return bytes_; }
    [[nodiscard]] std::uint64_t size() const { return bytes_.size(); }

    [[nodiscard]] std::uint64_t number(std::uint64_t at, unsigned width = 8) const;

    [[nodiscard]] std::string with(const Damage& damage) const;

    [[nodiscard]] std::uint64_t cluster_size() const { return std::uint64_t{1} << number(20, 4); }
    [[nodiscard]] std::uint64_t l1() const { return number(40); }
    [[nodiscard]] std::uint64_t refcount_table() const { return number(48); }
    [[nodiscard]] std::uint64_t first_refcount_block() const { return number(refcount_table()); }
    [[nodiscard]] std::uint64_t snapshots() const { return number(64); }
    [[nodiscard]] std::uint64_t l2(std::uint64_t l1_index) const { return number(l1() + 8 * l1_index) & offset_mask; }

    /// The host offset of the L2 entry of a guest cluster below the first L1 entry.
    [[nodiscard]] std::uint64_t l2_entry(std::uint64_t guest_cluster, unsigned entry_bytes = 8) const;

    /// The host offset of a 16-bit refcount in the first block.
    [[nodiscard]] std::uint64_t refcount(std::uint64_t host_offset) const;

    /// The host offset of a header extension's data.
    [[nodiscard]] std::uint64_t extension(std::uint32_t type) const;

    [[nodiscard]] std::uint64_t bitmap_directory() const { return number(extension(0x23852875) + 16); }

private:
    std::string bytes_;
};

/// What a check comes to.
enum class Verdict { clean, leaks, corrupt, check_fails, cannot_open, crashed };

std::string_view verdict_name(Verdict verdict);

inline void PrintTo(Verdict verdict, std::ostream* out) { *out << verdict_name(verdict); }

Verdict peer_verdict(const Finished& check);

Verdict verdict_of(const CheckReport& report);

}  // namespace qcow::test
