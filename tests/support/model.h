#pragma once
// What each sector of a disk may hold, when writes overlap, fail, or are cut short by a power loss.

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <span>
#include <vector>

#include "support/bytes.h"

namespace qcow::test {

inline constexpr std::uint64_t sector_bytes = 512;

// ---- Sectors that say whose they are ----

/// What a sector holds: 0 for zeros, else the number of the write that filled it.
using Value = std::uint64_t;

/// Not what any write leaves at that place.
inline constexpr Value foreign = ~Value{0};

/// Fills whole sectors, the first of which is number `first` of the disk.
inline void stamp(std::uint64_t first, Value value, std::span<std::byte> sectors) {
    for (std::size_t at = 0; at < sectors.size(); at += 16) {
        const std::uint64_t words[] = {value == 0 ? 0 : ~(first + at / sector_bytes), value};
        std::memcpy(sectors.data() + at, words, 16);
    }
}

inline Bytes stamped(std::uint64_t first, std::uint64_t count, Value value) {
    Bytes result(count * sector_bytes);
    stamp(first, value, result);
    return result;
}

/// The value of sector number `index`, as it was read.
inline Value value_in(std::uint64_t index, std::span<const std::byte> sector) {
    std::uint64_t words[2] = {};
    std::memcpy(words, sector.data(), 16);
    const bool whole = std::memcmp(sector.data(), sector.data() + 16, sector_bytes - 16) == 0;
    if (whole && words[0] == 0 && words[1] == 0) return 0;
    return whole && words[0] == ~index ? words[1] : foreign;
}

// ---- What is allowed ----

/// Moments: all different, later ones greater. 0 is before everything.
using Tick = std::size_t;

/// The values of one place over time.
class Timeline {
public:
    explicit Timeline(Value first = 0) : versions_{{first, 0, 1}} {}

    /// A value that may be there from now on. It replaces what ended before it, unless it is `weak`: then it is only
    /// one more possibility.
    void begin(Value value, Tick at, bool weak = false) { versions_.push_back({value, at, never, weak}); }

    /// That which began then is complete, and `durable` if it needs no flush to survive.
    void end(Tick begun, Tick at, bool durable = false) {
        for (auto& version : versions_) {
            if (version.begin != begun) continue;
            version.end = at;
            version.durable = durable;
        }
    }

    /// As end(), of what failed: it may have been done or not.
    void fail(Tick begun, Tick at) {
        for (auto& version : versions_) {
            if (version.begin == begun) version.weak = true;
        }
        end(begun, at);
    }

    /// What may be there at `now`, where all that ended before `settled` has had its effect.
    [[nodiscard]] bool allows(Value value, Tick settled, Tick now) const {
        const auto latest = latest_settled(settled, now);
        return std::ranges::any_of(versions_, [&](const Version& version) {
            return version.value == value && version.begin < now && version.end > latest;
        });
    }

    /// Whether something may have begun to change it that is not settled.
    [[nodiscard]] bool unsettled(Tick settled, Tick now) const {
        return std::ranges::any_of(
            versions_, [&](const Version& version) { return version.begin < now && version.end > settled; });
    }

    [[nodiscard]] std::vector<Value> allowed(Tick settled, Tick now) const {
        std::vector<Value> result;
        for (const auto& version : versions_) {
            if (allows(version.value, settled, now) && std::ranges::find(result, version.value) == result.end())
                result.push_back(version.value);
        }
        return result;
    }

private:
    static constexpr Tick never = ~Tick{0};

    struct Version {
        Value value = 0;
        Tick begin = 0;
        Tick end = never;
        bool weak = false;
        bool durable = false;
    };

    /// When the last of those began that are settled: what ended before that is gone.
    [[nodiscard]] Tick latest_settled(Tick settled, Tick now) const {
        Tick latest = 0;
        for (const auto& version : versions_) {
            const bool is_settled = version.end <= settled || (version.durable && version.end < now);
            if (is_settled && !version.weak) latest = std::max(latest, version.begin);
        }
        return latest;
    }

    std::vector<Version> versions_;
};

/// The sectors of a disk, and its size, over time.
class SectorModel {
public:
    /// `sectors` of them at first, room for `most`.
    explicit SectorModel(std::uint64_t sectors, std::uint64_t most = 0)
        : sectors_(std::max(sectors, most)), size_(Timeline(sectors)) {}

    /// What is there before everything else.
    void preset(std::uint64_t index, Value value) { sectors_[index] = Timeline(value); }

    struct Change {
        std::uint64_t first = 0;
        std::uint64_t count = 0;
        Tick begun = 0;
    };

    Change begin(std::uint64_t first, std::uint64_t count, Value value, Tick at, bool weak = false) {
        const std::lock_guard lock(mutex_);
        for (auto i = first; i < first + count; ++i) sectors_[i].begin(value, at, weak);
        return {first, count, at};
    }
    void end(const Change& change, Tick at, bool durable = false) {
        const std::lock_guard lock(mutex_);
        for (auto i = change.first; i < change.first + change.count; ++i) sectors_[i].end(change.begun, at, durable);
    }

    void fail(const Change& change, Tick at) {
        const std::lock_guard lock(mutex_);
        for (auto i = change.first; i < change.first + change.count; ++i) sectors_[i].fail(change.begun, at);
    }

    void begin_resize(std::uint64_t sectors, Tick at) { size_.begin(sectors, at); }
    void end_resize(Tick begun, Tick at) { size_.end(begun, at); }

    void flushed(Tick begun, Tick ended) {
        const std::lock_guard lock(mutex_);
        flushes_.push_back({begun, ended});
    }

    /// What has ended before this moment survives a power loss at `now`.
    [[nodiscard]] Tick settled_at(Tick now) const {
        const std::lock_guard lock(mutex_);
        Tick settled = 1;
        for (const auto& flush : flushes_) {
            if (flush.ended < now) settled = std::max(settled, flush.begun);
        }
        return settled;
    }

    /// Whether a flush was under way that succeeded.
    [[nodiscard]] bool flushing_at(Tick now) const {
        const std::lock_guard lock(mutex_);
        return std::ranges::any_of(flushes_,
                                   [&](const Flush& flush) { return flush.begun < now && now < flush.ended; });
    }

    [[nodiscard]] bool allows(std::uint64_t index, Value value, Tick settled, Tick now) const {
        const std::lock_guard lock(mutex_);
        return sectors_[index].allows(value, settled, now);
    }
    [[nodiscard]] bool unsettled(std::uint64_t index, Tick settled, Tick now) const {
        const std::lock_guard lock(mutex_);
        return sectors_[index].unsettled(settled, now);
    }
    [[nodiscard]] bool allows_size(std::uint64_t sectors, Tick settled, Tick now) const {
        return size_.allows(sectors, settled, now);
    }

    /// "sector 7 holds write 9, not one of 3, 4".
    [[nodiscard]] std::string complaint(std::uint64_t index, Value value, Tick settled, Tick now) const {
        const std::lock_guard lock(mutex_);
        return fmt::format("sector {} holds {}, not one of {}", index,
                           value == foreign ? "what was never written there" : std::to_string(value),
                           fmt::join(sectors_[index].allowed(settled, now), ", "));
    }

private:
    struct Flush {
        Tick begun = 0;
        Tick ended = 0;
    };

    mutable std::mutex mutex_;
    std::vector<Timeline> sectors_;
    Timeline size_;
    std::vector<Flush> flushes_;
};

}  // namespace qcow::test
