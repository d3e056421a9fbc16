#include "support/model.h"

namespace qcow::test {

void stamp(std::uint64_t first, Value value, std::span<std::byte> sectors) {
    for (std::size_t at = 0; at < sectors.size(); at += 16) {
        const std::uint64_t words[] = {value == 0 ? 0 : ~(first + at / sector_bytes), value};
        std::memcpy(sectors.data() + at, words, 16);
    }
}

Bytes stamped(std::uint64_t first, std::uint64_t count, Value value) {
    Bytes result(count * sector_bytes);
    stamp(first, value, result);
    return result;
}

Value value_in(std::uint64_t index, std::span<const std::byte> sector) {
    std::uint64_t words[2] = {};
    std::memcpy(words, sector.data(), 16);
    const bool whole = std::memcmp(sector.data(), sector.data() + 16, sector_bytes - 16) == 0;
    if (whole && words[0] == 0 && words[1] == 0) return 0;
    return whole && words[0] == ~index ? words[1] : foreign;
}

void Timeline::end(Tick begun, Tick at, bool durable) {
    for (auto& version : versions_) {
        if (version.begin != begun) continue;
        version.end = at;
        version.durable = durable;
    }
}

void Timeline::fail(Tick begun, Tick at) {
    for (auto& version : versions_) {
        if (version.begin == begun) version.weak = true;
    }
    end(begun, at);
}

bool Timeline::allows(Value value, Tick settled, Tick now) const {
    const auto latest = latest_settled(settled, now);
    return std::ranges::any_of(versions_, [&](const Version& version) {
        return version.value == value && version.begin < now && version.end > latest;
    });
}

bool Timeline::unsettled(Tick settled, Tick now) const {
    return std::ranges::any_of(versions_,
                               [&](const Version& version) { return version.begin < now && version.end > settled; });
}

std::vector<Value> Timeline::allowed(Tick settled, Tick now) const {
    std::vector<Value> result;
    for (const auto& version : versions_) {
        if (allows(version.value, settled, now) && std::ranges::find(result, version.value) == result.end())
            result.push_back(version.value);
    }
    return result;
}

Tick Timeline::latest_settled(Tick settled, Tick now) const {
    Tick latest = 0;
    for (const auto& version : versions_) {
        const bool is_settled = version.end <= settled || (version.durable && version.end < now);
        if (is_settled && !version.weak) latest = std::max(latest, version.begin);
    }
    return latest;
}

SectorModel::Change SectorModel::begin(std::uint64_t first, std::uint64_t count, Value value, Tick at, bool weak) {
    const std::lock_guard lock(mutex_);
    for (auto i = first; i < first + count; ++i) sectors_[i].begin(value, at, weak);
    return {first, count, at};
}

void SectorModel::end(const Change& change, Tick at, bool durable) {
    const std::lock_guard lock(mutex_);
    for (auto i = change.first; i < change.first + change.count; ++i) sectors_[i].end(change.begun, at, durable);
}

void SectorModel::fail(const Change& change, Tick at) {
    const std::lock_guard lock(mutex_);
    for (auto i = change.first; i < change.first + change.count; ++i) sectors_[i].fail(change.begun, at);
}

void SectorModel::flushed(Tick begun, Tick ended) {
    const std::lock_guard lock(mutex_);
    flushes_.push_back({begun, ended});
}

Tick SectorModel::settled_at(Tick now) const {
    const std::lock_guard lock(mutex_);
    Tick settled = 1;
    for (const auto& flush : flushes_) {
        if (flush.ended < now) settled = std::max(settled, flush.begun);
    }
    return settled;
}

bool SectorModel::flushing_at(Tick now) const {
    const std::lock_guard lock(mutex_);
    return std::ranges::any_of(flushes_, [&](const Flush& flush) { return flush.begun < now && now < flush.ended; });
}

bool SectorModel::allows(std::uint64_t index, Value value, Tick settled, Tick now) const {
    const std::lock_guard lock(mutex_);
    return sectors_[index].allows(value, settled, now);
}

bool SectorModel::unsettled(std::uint64_t index, Tick settled, Tick now) const {
    const std::lock_guard lock(mutex_);
    return sectors_[index].unsettled(settled, now);
}

bool SectorModel::allows_size(std::uint64_t sectors, Tick settled, Tick now) const {
    return size_.allows(sectors, settled, now);
}

std::string SectorModel::complaint(std::uint64_t index, Value value, Tick settled, Tick now) const {
    const std::lock_guard lock(mutex_);
    return fmt::format("sector {} holds {}, not one of {}", index,
                       value == foreign ? "what was never written there" : std::to_string(value),
                       fmt::join(sectors_[index].allowed(settled, now), ", "));
}

}  // namespace qcow::test
