#include "interop/damaged_image.h"

namespace qcow::test {

std::uint64_t SoundImage::number(std::uint64_t at, unsigned width) const {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < width; ++i) value = value << 8 | static_cast<unsigned char>(bytes_.at(at + i));
    return value;
}

std::string SoundImage::with(const Damage& damage) const {
    auto result = bytes_;
    for (unsigned i = 0; i < damage.width; ++i)
        result.at(damage.at + i) = static_cast<char>(damage.value >> (8 * (damage.width - 1 - i)));
    return result;
}

std::uint64_t SoundImage::l2_entry(std::uint64_t guest_cluster, unsigned entry_bytes) const {
    return l2(0) + guest_cluster * entry_bytes;
}

std::uint64_t SoundImage::refcount(std::uint64_t host_offset) const {
    return first_refcount_block() + host_offset / cluster_size() * 2;
}

std::uint64_t SoundImage::extension(std::uint32_t type) const {
    for (std::uint64_t at = number(100, 4); number(at, 4) != 0; at += 8 + (number(at + 4, 4) + 7) / 8 * 8) {
        if (number(at, 4) == type) return at + 8;
    }
    throw std::runtime_error(fmt::format("no extension {:#x}", type));
}

std::string_view verdict_name(Verdict verdict) {
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

Verdict peer_verdict(const Finished& check) {
    switch (check.status) {
        case 0: return Verdict::clean;
        case 2: return Verdict::corrupt;
        case 3: return Verdict::leaks;
        case 1:
            return check.err.find("Could not open") != std::string::npos ? Verdict::cannot_open : Verdict::check_fails;
        default: return Verdict::crashed;
    }
}

Verdict verdict_of(const CheckReport& report) {
    if (report.corruptions > 0 || report.errors > 0) return Verdict::corrupt;
    return report.leaks > 0 ? Verdict::leaks : Verdict::clean;
}

}  // namespace qcow::test
