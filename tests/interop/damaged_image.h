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

    [[nodiscard]] std::uint64_t number(std::uint64_t at, unsigned width = 8) const {
        std::uint64_t value = 0;
        for (unsigned i = 0; i < width; ++i) value = value << 8 | static_cast<unsigned char>(bytes_.at(at + i));
        return value;
    }

    [[nodiscard]] std::string with(const Damage& damage) const {
        auto result = bytes_;
        for (unsigned i = 0; i < damage.width; ++i)
            result.at(damage.at + i) = static_cast<char>(damage.value >> (8 * (damage.width - 1 - i)));
        return result;
    }

    [[nodiscard]] std::uint64_t cluster_size() const { return std::uint64_t{1} << number(20, 4); }
    [[nodiscard]] std::uint64_t l1() const { return number(40); }
    [[nodiscard]] std::uint64_t refcount_table() const { return number(48); }
    [[nodiscard]] std::uint64_t first_refcount_block() const { return number(refcount_table()); }
    [[nodiscard]] std::uint64_t snapshots() const { return number(64); }
    [[nodiscard]] std::uint64_t l2(std::uint64_t l1_index) const { return number(l1() + 8 * l1_index) & offset_mask; }

    /// The host offset of the L2 entry of a guest cluster below the first L1 entry.
    [[nodiscard]] std::uint64_t l2_entry(std::uint64_t guest_cluster, unsigned entry_bytes = 8) const {
        return l2(0) + guest_cluster * entry_bytes;
    }

    /// The host offset of a 16-bit refcount in the first block.
    [[nodiscard]] std::uint64_t refcount(std::uint64_t host_offset) const {
        return first_refcount_block() + host_offset / cluster_size() * 2;
    }

    /// The host offset of a header extension's data.
    [[nodiscard]] std::uint64_t extension(std::uint32_t type) const {
        for (std::uint64_t at = number(100, 4); number(at, 4) != 0; at += 8 + (number(at + 4, 4) + 7) / 8 * 8) {
            if (number(at, 4) == type) return at + 8;
        }
        throw std::runtime_error(fmt::format("no extension {:#x}", type));
    }

    [[nodiscard]] std::uint64_t bitmap_directory() const { return number(extension(0x23852875) + 16); }

private:
    std::string bytes_;
};

/// What a check comes to.
enum class Verdict { clean, leaks, corrupt, check_fails, cannot_open, crashed };

inline std::string_view verdict_name(Verdict verdict) {
    switch (verdict) {
        case Verdict::clean: return "clean";
        case Verdict::leaks: return "leaks";
        case Verdict::corrupt: return "corrupt";
        case Verdict::check_fails: return "check fails";
        case Verdict::cannot_open: return "cannot open";
        case Verdict::crashed: return "crashed";
    }
    return "";
}

inline void PrintTo(Verdict verdict, std::ostream* out) { *out << verdict_name(verdict); }

inline Verdict peer_verdict(const Finished& check) {
    switch (check.status) {
        case 0: return Verdict::clean;
        case 2: return Verdict::corrupt;
        case 3: return Verdict::leaks;
        case 1:
            return check.err.find("Could not open") != std::string::npos ? Verdict::cannot_open : Verdict::check_fails;
        default: return Verdict::crashed;
    }
}

inline Verdict verdict_of(const CheckReport& report) {
    if (report.corruptions > 0 || report.errors > 0) return Verdict::corrupt;
    return report.leaks > 0 ? Verdict::leaks : Verdict::clean;
}

}  // namespace qcow::test
