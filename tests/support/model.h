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
void stamp(std::uint64_t first, Value value, std::span<std::byte> sectors);

Bytes stamped(std::uint64_t first, std::uint64_t count, Value value);

/// The value of sector number `index`, as it was read.
Value value_in(std::uint64_t index, std::span<const std::byte> sector);

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
    void end(Tick begun, Tick at, bool durable = false);

    /// As end(), of what failed: it may have been done or not.
    void fail(Tick begun, Tick at);

    /// What may be there at `now`, where all that ended before `settled` has had its effect.
    [[nodiscard]] bool allows(Value value, Tick settled, Tick now) const;

    /// Whether something may have begun to change it that is not settled.
    [[nodiscard]] bool unsettled(Tick settled, Tick now) const;

    [[nodiscard]] std::vector<Value> allowed(Tick settled, Tick now) const;

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
    [[nodiscard]] Tick latest_settled(Tick settled, Tick now) const;

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

    Change begin(std::uint64_t first, std::uint64_t count, Value value, Tick at, bool weak = false);
    void end(const Change& change, Tick at, bool durable = false);

    void fail(const Change& change, Tick at);

    void begin_resize(std::uint64_t sectors, Tick at) { size_.begin(sectors, at); }
    void end_resize(Tick begun, Tick at) { size_.end(begun, at); }

    void flushed(Tick begun, Tick ended);

    /// What has ended before this moment survives a power loss at `now`.
    [[nodiscard]] Tick settled_at(Tick now) const;

    /// Whether a flush was under way that succeeded.
    [[nodiscard]] bool flushing_at(Tick now) const;

    [[nodiscard]] bool allows(std::uint64_t index, Value value, Tick settled, Tick now) const;
    [[nodiscard]] bool unsettled(std::uint64_t index, Tick settled, Tick now) const;
    [[nodiscard]] bool allows_size(std::uint64_t sectors, Tick settled, Tick now) const;

    /// "sector 7 holds write 9, not one of 3, 4".
    [[nodiscard]] std::string complaint(std::uint64_t index, Value value, Tick settled, Tick now) const;

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
