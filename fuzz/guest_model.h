#pragma once
// What a fuzzed guest has written where, by its own account.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>

#include "base/bits.h"
#include "base/endian.h"

namespace qcow::fuzz {

/// What a run of guest bytes holds.
struct Contents {
    enum class Kind : std::uint8_t {
        original,  ///< what was there before everything else
        zeros,
        words,      ///< 64-bit words that can be told from everything else, with their number and place
        scrambled,  ///< the same, with words between them that cannot be compressed
        unknown,    ///< a change failed half-way
    };
    Kind kind = Kind::original;
    std::uint8_t number = 0;

    bool operator==(const Contents&) const = default;
};

/// Words that nothing but this guest writes: `secret` depends on the whole input, which can therefore not hold it.
class Guest {
public:
    explicit Guest(std::span<const std::byte> input) {
        secret_ = 0xcbf2'9ce4'8422'2325;
        for (const auto b : input) secret_ = (secret_ ^ static_cast<std::uint8_t>(b)) * 0x0000'0100'0000'01b3;
        secret_ >>= 24;
    }

    /// The guest bytes from `at` on. Not for what is original or unknown.
    void fill(std::uint64_t at, std::span<std::byte> to, Contents contents) const {
        while (!to.empty()) {
            std::array<std::byte, 8> bytes;
            store_be(bytes, 0, word(at / 8, contents));
            const auto part = std::span(bytes).subspan(at % 8, std::min<std::size_t>(8 - at % 8, to.size()));
            std::memcpy(to.data(), part.data(), part.size());
            at += part.size();
            to = to.subspan(part.size());
        }
    }

    /// Whether one of the guest's words is here.
    [[nodiscard]] bool wrote(std::uint64_t word) const { return word >> 24 == secret_; }

private:
    [[nodiscard]] std::uint64_t word(std::uint64_t index, Contents contents) const {
        if (contents.kind == Contents::Kind::zeros) return 0;
        if (contents.kind == Contents::Kind::scrambled && index % 512 != 0) {
            std::uint64_t mixed = (index ^ std::uint64_t{contents.number} << 48) + 0x9e37'79b9'7f4a'7c15 * (index + 1);
            mixed = (mixed ^ mixed >> 30) * 0xbf58'476d'1ce4'e5b9;
            return mixed ^ mixed >> 27;
        }
        return secret_ << 24 | std::uint64_t{contents.number} << 16 | (index & 0xffff);
    }

    std::uint64_t secret_ = 0;  // 40 bits
};

/// What each byte of a disk holds.
class GuestModel {
public:
    void assign(std::uint64_t begin, std::uint64_t end, Contents contents) {
        if (begin >= end) return;
        split(begin);
        split(end);
        runs_.erase(runs_.find(begin), runs_.find(end));
        runs_[begin] = contents;
    }

    /// Calls `visit` with begin, end and contents of each run in [begin, end).
    template <class Visit>
    void each(std::uint64_t begin, std::uint64_t end, Visit&& visit) const {
        for (auto run = --runs_.upper_bound(begin); run != runs_.end() && run->first < end; ++run) {
            const auto next = std::next(run);
            const std::uint64_t last = next == runs_.end() ? end : std::min(end, next->first);
            visit(std::max(begin, run->first), last, run->second);
        }
    }

private:
    void split(std::uint64_t at) { runs_.emplace(at, (--runs_.upper_bound(at))->second); }

    std::map<std::uint64_t, Contents> runs_ = {{0, {}}};  // by where they begin
};

}  // namespace qcow::fuzz
