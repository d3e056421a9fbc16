#include "engine/script.h"

#include <array>

#include "qcow/bitmaps.h"
#include "support/scattered.h"

namespace qcow::test {

void Script::step() {
    const auto dice = random_.below(100);
    if (dice < 4 && subject_.has_snapshots) return change_snapshots();
    if (dice < 8 && subject_.has_bitmaps) return change_bitmaps();
    if (dice < 10 && subject_.commit) return commit();
    if (dice < 38) return write();
    if (dice < 50) return zero();
    if (dice < 62) return discard();
    if (dice < 74) return read();
    if (dice < 80) return subject_.can_compress ? write_compressed() : write();
    if (dice < 86) return flush();
    if (dice < 89) return walk();
    if (dice < 92) return refuse();
    if (dice < 96) return resize();
    return reopen();
}

Script::Range Script::range() {
    const auto size = expected_.size();
    const auto block = image_->block_size();
    auto at = random_.below(size);
    auto length = random_.between(1, random_.pick({std::uint64_t{16}, std::uint64_t{512}, 3 * block, size / 8 + 1}));
    const auto grain = random_.pick({std::uint64_t{1}, std::uint64_t{512}, block});
    at = at / grain * grain;
    if (random_.chance(50)) length = (length + grain - 1) / grain * grain;
    if (random_.chance(3)) length = size;
    return {at, std::min(length, size - at)};
}

void Script::demand(bool condition, const std::string& otherwise) {
    if (!condition) throw std::runtime_error(otherwise);
}

Bytes Script::data(std::uint64_t length) {
    if (random_.chance(15)) return Bytes(length);
    if (random_.chance(30)) return repeated(length, static_cast<std::uint8_t>(random_.between(1, 255)));
    const auto text = random_.bytes(length);
    const auto bytes = std::as_bytes(std::span(text));
    Bytes result(bytes.begin(), bytes.end());
    if (random_.chance(20)) {
        const auto zeros = random_.below(length);
        std::fill_n(result.begin() + static_cast<std::ptrdiff_t>(random_.below(length - zeros)), zeros, std::byte{0});
    }
    return result;
}

void Script::expect(Range where, const Bytes& bytes) {
    std::ranges::copy(bytes, expected_.begin() + static_cast<std::ptrdiff_t>(where.at));
    mark(where);
}

void Script::mark(Range where) {
    for (auto& bitmap : bitmaps_) {
        if (bitmap.enabled) bitmap.changed.push_back(where);
    }
}

void Script::write() {
    const auto where = range();
    const Bytes bytes = data(where.length);
    note(fmt::format("write {} {}", where.at, where.length));
    const auto pieces = cut_up(std::span(bytes), random_);
    value_of(image_->write({where.at}, random_.chance(50) ? ConstBuffers(pieces) : ConstBuffers(bytes)));
    expect(where, bytes);
}

void Script::write_compressed() {
    const auto block = image_->block_size();
    const auto at = random_.below(expected_.size()) / block * block;
    const Range where{at, std::min(random_.between(1, 3) * block, expected_.size() - at)};
    const auto bytes = data(where.length);
    note(fmt::format("write_compressed {} {}", where.at, where.length));
    value_of(image_->write_compressed({where.at}, bytes));
    expect(where, bytes);
}

void Script::zero() {
    const auto where = range();
    const auto zeroes = random_.pick({Disk::Zeroes::keep, Disk::Zeroes::release});
    note(fmt::format("write_zeroes {} {} {}", where.at, where.length, zeroes == Disk::Zeroes::keep ? "keep" : ""));
    value_of(image_->write_zeroes({where.at}, where.length, zeroes));
    expect(where, Bytes(where.length));
}

void Script::discard() {
    const auto where = range();
    note(fmt::format("discard {} {}", where.at, where.length));
    value_of(image_->discard({where.at}, where.length));
    const auto block = image_->block_size();
    const auto end = where.at + where.length;
    for (auto begin = (where.at + block - 1) / block * block; begin < end; begin += block) {
        // A last block that is not whole because the disk ends there may count as whole.
        const auto length = std::min(block, expected_.size() - begin);
        if (begin + length > end) break;
        const auto found = read_bytes({begin, length});
        if (std::ranges::all_of(found, [](std::byte byte) { return byte == std::byte{0}; })) {
            const auto before = std::span(expected_).subspan(begin, length);
            if (!std::ranges::equal(before, found)) expect({begin, length}, found);
        } else {
            demand(length < block || !subject_.discards_read_as_zeros,
                   fmt::format("the block at {} does not read as zeros after a discard", begin));
        }
    }
    verify(where.at > block ? where.at - block : 0, std::min<std::uint64_t>(end + block, expected_.size()));
}

Bytes Script::read_bytes(Range where) {
    Bytes bytes(where.length, std::byte{0xa5});
    const auto pieces = cut_up(std::span(bytes), random_);
    value_of(image_->read({where.at}, random_.chance(50) ? Buffers(pieces) : Buffers(bytes)));
    return bytes;
}

void Script::verify(std::uint64_t begin, std::uint64_t end) {
    const auto found = read_bytes({begin, end - begin});
    const auto differ =
        std::mismatch(found.begin(), found.end(), expected_.begin() + static_cast<std::ptrdiff_t>(begin));
    demand(differ.first == found.end(),
           fmt::format("byte {} is {:#x}, not {:#x}", begin + static_cast<std::uint64_t>(differ.first - found.begin()),
                       differ.first == found.end() ? 0 : std::to_integer<unsigned>(*differ.first),
                       differ.first == found.end() ? 0 : std::to_integer<unsigned>(*differ.second)));
}

void Script::verify_all() {
    demand(image_->size() == expected_.size(), fmt::format("size {}, not {}", image_->size(), expected_.size()));
    verify(0, expected_.size());
}

void Script::read() {
    const auto where = range();
    note(fmt::format("read {} {}", where.at, where.length));
    verify(where.at, where.at + where.length);
}

void Script::flush() {
    note("flush");
    value_of(image_->flush());
}

void Script::walk() {
    note("extents");
    std::uint64_t at = 0;
    value_of(each_extent(*image_, {0}, image_->size(), [&](const Extent& extent) -> Result<void> {
        const auto wrong = [&](const char* what) {
            return std::unexpected(Error{Errc::corrupt, fmt::format("extent at {}", extent.start.value), what});
        };
        if (extent.start.value != at) return wrong("it does not follow the one before");
        at += extent.length;
        if (extent.kind == Extent::Kind::data) return {};
        const auto begin = expected_.begin() + static_cast<std::ptrdiff_t>(extent.start.value);
        const auto end = begin + static_cast<std::ptrdiff_t>(extent.length);
        if (std::any_of(begin, end, [](std::byte byte) { return byte != std::byte{0}; }))
            return wrong("it is said to be zeros");
        return {};
    }));
    demand(at == image_->size(), "the extents end too early");
}

void Script::refuse() {
    note("requests past the end");
    const auto size = image_->size();
    const Bytes bytes(1024, std::byte{1});
    demand(!image_->write({size - 1}, bytes) && !image_->write_zeroes({size}, 1) && !image_->discard({size - 1}, 2),
           "a request past the end succeeds");
    demand(!image_->resize(size / 2 / 512 * 512, Image::Shrink::refuse), "it becomes smaller although that is refused");
    verify_all();
}

void Script::resize() {
    const auto size = expected_.size();
    auto target = random_.between(1, largest / 512) * 512;
    if (random_.chance(50)) target = std::min(largest, size + 512 * random_.below(300));
    note(fmt::format("resize {} to {}", size, target));
    const auto resized = image_->resize(target, Image::Shrink::allow);
    const bool may_refuse = subject_.may_refuse_resize || !snapshots_.empty();  // in version 2
    if (!resized && may_refuse && resized.error().code == Errc::unsupported) return verify_all();
    value_of(resized);
    expected_.resize(target);
    cut_bitmaps();
    verify_all();
}

/// They forget what lies behind the end.
void Script::cut_bitmaps() {
    const auto size = expected_.size();
    for (auto& bitmap : bitmaps_) {
        std::erase_if(bitmap.changed, [&](const Range& range) { return range.at >= size; });
        for (auto& range : bitmap.changed) range.length = std::min(range.length, size - range.at);
    }
}

void Script::change_snapshots() {
    const auto count = snapshots_.size();
    const auto dice = random_.below(6);
    if (count == 0 || (dice < 2 && count < 3)) {
        note("snapshot");
        const auto made = image_->snapshots().create(fmt::format("made {}", snapshots_.size()));
        if (!made) {
            demand(made.error().code == Errc::limit_exceeded, made.error().message());  // narrow refcounts
            return verify_all();
        }
        snapshots_.push_back({made->id, expected_});
    } else {
        const auto chosen = snapshots_.begin() + static_cast<std::ptrdiff_t>(random_.below(count));
        if (dice == 2) {
            note(fmt::format("apply snapshot {}", chosen->id));
            const auto applied = image_->snapshots().apply(chosen->id);
            if (!applied) {
                demand(applied.error().code == Errc::limit_exceeded, applied.error().message());
                return verify_all();
            }
            expected_ = chosen->contents;
            cut_bitmaps();
            mark({0, expected_.size()});
        } else if (dice == 3) {
            note(fmt::format("remove snapshot {}", chosen->id));
            value_of(image_->snapshots().remove(chosen->id));
            snapshots_.erase(chosen);
        }
    }
    verify_all();
    for (const auto& snapshot : snapshots_) verify_snapshot(snapshot);
}

void Script::verify_snapshot(const Snapshot& snapshot) {
    const auto disk = value_of(image_->snapshots().open(snapshot.id));
    Bytes found(disk->size());
    value_of(disk->read({0}, found));
    demand(found == snapshot.contents, fmt::format("snapshot {} has changed", snapshot.id));
}

void Script::change_bitmaps() {
    using enum BitmapAction::Kind;
    const auto perform = [&](BitmapAction action) { value_of(image_->change_bitmaps(std::array{std::move(action)})); };
    const auto count = bitmaps_.size();
    const auto dice = random_.below(8);
    if (count == 0 || (dice < 2 && count < 3)) {
        const auto name = fmt::format("bitmap {}", random_.below(1'000'000'000));
        note("add " + name);
        perform({add, name, random_.pick({std::uint64_t{0}, std::uint64_t{512}, std::uint64_t{65536}})});
        bitmaps_.push_back({name, true, {}});
    } else {
        const auto chosen = bitmaps_.begin() + static_cast<std::ptrdiff_t>(random_.below(count));
        const auto& source = bitmaps_[random_.below(count)];
        static constexpr std::array kinds = {remove, clear, enable, disable, merge};
        const auto kind = kinds.at(random_.below(kinds.size()));
        note(fmt::format("change {} of {}, {}", static_cast<int>(kind), chosen->name, source.name));
        perform({kind, chosen->name, 0, source.name});
        if (kind == enable || kind == disable) chosen->enabled = kind == enable;
        if (kind == clear) chosen->changed.clear();
        if (kind == merge && &source != &*chosen)
            chosen->changed.insert(chosen->changed.end(), source.changed.begin(), source.changed.end());
        if (kind == clear) {
            value_of(image_->each_dirty(chosen->name, {0}, image_->size(), [](const DirtyRun& run) -> Result<void> {
                if (!run.dirty) return {};
                return std::unexpected(Error{Errc::corrupt, "a bitmap that was cleared", "it has dirty bits"});
            }));
        }
        if (kind == remove) bitmaps_.erase(chosen);
    }
    for (const auto& bitmap : bitmaps_) verify_bitmap(bitmap);
}

void Script::verify_bitmap(const Bitmap& bitmap) {
    for (const auto& range : bitmap.changed) {
        value_of(image_->each_dirty(bitmap.name, {range.at}, range.length, [&](const DirtyRun& run) -> Result<void> {
            demand(run.dirty, fmt::format("{}: a change of {} bytes at {} is not recorded at {}", bitmap.name,
                                          range.length, range.at, run.start.value));
            return {};
        }));
    }
}

void Script::commit() {
    close();
    note("commit");
    subject_.commit();
    image_ = subject_.open();
    verify_all();
    for (const auto& bitmap : bitmaps_) verify_bitmap(bitmap);
}

void Script::close() {
    value_of(image_->close());
    verify_all();
    demand(!image_->write({0}, bytes({1})), "it can be written although it is closed");
    image_.reset();
}

void Script::reopen() {
    note("reopen");
    if (random_.chance(50)) {
        close();
    } else {
        image_.reset();
    }
    image_ = subject_.open();
    verify_all();
    for (const auto& snapshot : snapshots_) verify_snapshot(snapshot);
    for (const auto& bitmap : bitmaps_) verify_bitmap(bitmap);
}

}  // namespace qcow::test
