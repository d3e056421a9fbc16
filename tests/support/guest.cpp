#include "support/guest.h"

namespace qcow::test {

Discarded::Discarded(std::uint64_t begin, std::uint64_t length, std::uint64_t block, std::uint64_t sectors) {
    const auto end = begin + length;
    first = (begin + block - 1) / block * block;
    tail_first = end / block * block;
    count = first < tail_first ? tail_first - first : 0;
    tail_count = end == sectors && end > tail_first && tail_first >= first ? end - tail_first : 0;
}

namespace {

std::vector<Value> values_in(std::span<const std::byte> disk) {
    std::vector<Value> values;
    for (std::uint64_t i = 0; i < disk.size() / sector_bytes; ++i)
        values.push_back(value_in(i, disk.subspan(i * sector_bytes, sector_bytes)));
    return values;
}

}  // namespace

void adopt(Disk& disk, SectorModel& model) {
    Bytes bytes(disk.size());
    if (!disk.read({0}, bytes)) throw std::runtime_error("the disk cannot be read");
    const auto values = values_in(bytes);
    for (std::uint64_t i = 0; i < values.size(); ++i) model.preset(i, values[i]);
}

Result<void> Guest::write(std::uint64_t first, std::uint64_t count) {
    const auto value = next_value_++;
    return change(first, count, value, [&] { return image_.write(offset(first), stamped(first, count, value)); });
}

Result<void> Guest::write_compressed(std::uint64_t first, std::uint64_t count) {
    const auto value = next_value_++;
    return change(first, count, value,
                  [&] { return image_.write_compressed(offset(first), stamped(first, count, value)); });
}

Result<void> Guest::write_zeroes(std::uint64_t first, std::uint64_t count, Disk::Zeroes zeroes) {
    return change(first, count, 0, [&] { return image_.write_zeroes(offset(first), count * sector_bytes, zeroes); });
}

Result<void> Guest::discard(std::uint64_t first, std::uint64_t count) {
    const auto block = std::max(image_.block_size() / sector_bytes, std::uint64_t{1});
    const Discarded range(first, count, block, sectors());
    const auto begun = clock_();
    const auto changed = model_.begin(range.first, range.count, 0, begun, !discards_read_as_zeros_);
    const auto changed_tail = model_.begin(range.tail_first, range.tail_count, 0, begun, true);
    auto result = image_.discard(offset(first), count * sector_bytes);
    settle(result, changed);
    settle(result, changed_tail);
    return result;
}

Result<void> Guest::change_snapshots(std::uint64_t dice) {
    auto handle = image_.snapshots();
    if (snapshots_.empty() || snapshots_.back().removing != Snapshot::never) {
        const auto name = "made-" + std::to_string(snapshots_.size());
        Snapshot snapshot{name, name + "-renamed", Bytes(image_.size())};
        if (auto made = handle.create(snapshot.name); !made) return std::unexpected(std::move(made).error());
        snapshot.made = clock_();
        if (auto read = image_.read({0}, snapshot.contents); !read) return read;
        snapshots_.push_back(std::move(snapshot));
        return {};
    }
    auto& last = snapshots_.back();
    if (dice % 4 == 0) {
        last.removing = clock_();
        auto removed = handle.remove(last.name);
        if (removed) last.gone = clock_();
        return removed;
    }
    if (dice % 4 == 1) {
        auto renamed = handle.rename(last.name, last.other_name);
        if (renamed) std::swap(last.name, last.other_name);
        return renamed;
    }
    return change_all(values_in(last.contents), [&] { return handle.apply(last.name); });
}

Result<void> Guest::make_empty() {
    Bytes below(image_.size());
    if (const auto backing = image_.backing()) {
        const auto there = std::min<std::uint64_t>(below.size(), backing->size());
        if (auto read = backing->read({0}, std::span(below).first(there)); !read) return read;
    }
    return change_all(values_in(below), [&] { return image_.make_empty(); });
}

Result<void> Guest::flush() {
    const auto begun = clock_();
    auto result = image_.flush();
    if (!result) ++failed_flushes_;
    if (result) model_.flushed(begun, clock_());
    return result;
}

Result<void> Guest::close() {
    const auto begun = clock_();
    auto result = image_.close();
    if (result) model_.flushed(begun, clock_());
    return result;
}

Result<void> Guest::resize(std::uint64_t count, Image::Shrink shrink) {
    const auto before = sectors();
    const auto begun = clock_();
    const auto lost = count < before ? model_.begin(count, before - count, 0, begun) : SectorModel::Change{0, 0, begun};
    model_.begin_resize(count, begun);
    auto result = image_.resize(count * sector_bytes, shrink);
    if (!result) return result;
    const auto ended = clock_();
    model_.end(lost, ended);
    model_.end_resize(begun, ended);
    return result;
}

Result<std::optional<std::string>> Guest::inspect(std::uint64_t first, std::uint64_t count) {
    Bytes bytes(count * sector_bytes);
    const auto begun = clock_();
    if (const auto read = image_.read(offset(first), bytes); !read) return std::unexpected(read.error());
    const auto ended = clock_();
    for (std::uint64_t i = 0; i < count; ++i) {
        const auto value = value_in(first + i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
        if (!model_.allows(first + i, value, begun, ended)) return model_.complaint(first + i, value, begun, ended);
    }
    return std::nullopt;
}

std::optional<std::string> Guest::verify(std::uint64_t first, std::uint64_t count) {
    auto wrong = inspect(first, count);
    return wrong ? *std::move(wrong) : wrong.error().message();
}

void Guest::settle(const Result<void>& result, const SectorModel::Change& change) {
    if (result) {
        model_.end(change, clock_());
        const auto now = clock_();
        if (writethrough_) model_.flushed(now, now);
    } else {
        model_.fail(change, clock_());
    }
}

}  // namespace qcow::test
