#include "qcow2/bitmap_changes.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <list>
#include <map>
#include <optional>

#include "base/try.h"
#include "qcow/text.h"
#include "qcow2/bitmap_runs.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {
namespace {

using format::BitmapEntry;
using Kind = BitmapAction::Kind;

struct Bitmap {
    BitmapEntry entry;
    std::vector<std::byte> encoded;                            // extra data stay as they are
    std::optional<std::vector<std::uint64_t>> new_words = {};  // of a table that is not written yet

    void set_table(HostOffset table) {
        entry.table = table;
        store_be(encoded, 0, table.value);
        new_words.reset();
    }

    void set_enabled(bool enabled) {
        entry.flags = enabled ? entry.flags | BitmapEntry::enabled_flag : entry.flags & ~BitmapEntry::enabled_flag;
        entry.info.enabled = enabled;
        store_be(encoded, BitmapEntry::flags_at, entry.flags);
    }
};

class BitmapChanges {
public:
    explicit BitmapChanges(WritableMetadata& writable)
        : writable_(writable), metadata_(writable.metadata()), state_(metadata_.state()), change_(writable) {}

    Result<void> load() {
        const auto entries = TRY(read_bitmaps(metadata_));
        if (entries.empty()) return {};
        std::vector<std::byte> bytes(state_.bitmaps->directory_size);
        TRY(metadata_.file().read(state_.bitmaps->directory, bytes));
        auto rest = std::span<const std::byte>(bytes);
        for (const auto& entry : entries) {
            const auto encoded = rest.first(entry.encoded_bytes);
            keep({entry, {encoded.begin(), encoded.end()}});
            rest = rest.subspan(encoded.size());
        }
        return {};
    }

    Result<void> apply(const BitmapAction& action) {
        if (action.kind == Kind::add) return add(action);
        const auto bitmap = TRY(find(action.bitmap));
        if (action.kind == Kind::remove) return remove(bitmap);
        TRY_VOID(verify_usable(*bitmap));
        switch (action.kind) {
            case Kind::clear: return clear(*bitmap);
            case Kind::merge: return merge(*bitmap, action);
            default: bitmap->set_enabled(action.kind == Kind::enable); return {};
        }
    }

    Result<void> commit() {
        std::vector<std::byte> directory;
        for (auto& bitmap : bitmaps_) {
            TRY_VOID(write_table(bitmap));
            directory.insert(directory.end(), bitmap.encoded.begin(), bitmap.encoded.end());
        }
        if (directory.size() > format::max_bitmap_directory_bytes)
            return fail(Errc::limit_exceeded, file_name(),
                        "the names of its bitmaps fill 16 MiB; remove bitmaps first");
        std::optional<format::BitmapsExtension> extension;
        if (!bitmaps_.empty()) {
            extension = {.count = static_cast<std::uint32_t>(bitmaps_.size()),
                         .directory_size = directory.size(),
                         .directory = TRY(write(std::move(directory)))};
        }
        if (state_.bitmaps_consistent()) change_.drop_table(state_.bitmaps->directory, state_.bitmaps->directory_size);
        TRY_VOID(writable_.sync());
        TRY_VOID(writable_.edit_header([&](format::HeaderEdit& header, format::HeaderState& state) {
            using enum format::ExtensionType;
            state.bitmaps = extension;
            if (extension) {
                state.autoclear |= format::autoclear::bitmaps;
                header.set_extension(bitmaps, encode_bitmaps_extension(*extension));
            } else {
                state.autoclear &= ~format::autoclear::bitmaps;
                header.remove_extension(bitmaps);
            }
        }));
        change_.commit();
        return {};
    }

private:
    using Position = std::list<Bitmap>::iterator;

    [[nodiscard]] const std::string& file_name() const { return name_; }

    [[nodiscard]] std::string place_of(std::string_view name) const {
        return fmt::format("{}: bitmap \"{}\"", file_name(), printable(name));
    }

    Result<Position> find(std::string_view name) {
        const auto found = by_name_.lower_bound(name);
        if (found == by_name_.end() || found->first != name)
            return fail(Errc::not_found, place_of(name), "there is none of this name; qcow info lists the bitmaps");
        return found->second;
    }

    void keep(Bitmap bitmap) {
        const auto position = bitmaps_.insert(bitmaps_.end(), std::move(bitmap));
        by_name_.emplace(position->entry.info.name, position);
    }

    [[nodiscard]] Result<void> verify_usable(const Bitmap& bitmap) const {
        if (bitmap.entry.info.in_use) {
            return fail(
                Errc::corrupt, place_of(bitmap.entry.info.name),
                "it is in use: a writer did not save it, so its bits cannot be trusted; remove it and add a new "
                "one");
        }
        return bitmap.new_words ? Result<void>() : verify_bitmap(metadata_, bitmap.entry);
    }

    Result<void> add(const BitmapAction& action) {
        const auto bad = [&](Errc code, std::string what) {
            return fail(code, place_of(action.bitmap), std::move(what));
        };
        const auto invalid = [&](std::string what) { return bad(Errc::invalid_argument, std::move(what)); };
        if (action.bitmap.empty() || action.bitmap.size() > BitmapEntry::max_name_length) {
            return invalid(fmt::format("its name has {} bytes, and names have 1 to {}", action.bitmap.size(),
                                       BitmapEntry::max_name_length));
        }
        const std::uint64_t granularity =
            action.granularity == 0 ? std::clamp(cluster_size(), 4 * KiB, 64 * KiB) : action.granularity;
        if (!std::has_single_bit(granularity) || granularity < bit(BitmapEntry::min_granularity_bits) ||
            granularity > bit(BitmapEntry::max_granularity_bits))
            return invalid(fmt::format("granularity {} is not a power of two from 512 to 2G", granularity));
        if (by_name_.contains(action.bitmap))
            return invalid("there is one of this name already; remove it or clear it");
        if (state_.size == 0) return invalid("a disk of 0 bytes has no bitmaps; resize it first");
        if (bitmaps_.size() >= format::max_bitmaps)
            return bad(Errc::limit_exceeded, "the image has 65535 bitmaps, and no room for more; remove others first");
        const std::uint64_t entries = divide_up(divide_up(state_.size, granularity), cluster_size() * 8);
        if (entries > format::max_bitmap_bytes / cluster_size()) {
            return bad(Errc::limit_exceeded,
                       fmt::format("with granularity {} it would have more than 512 MiB of bits; use a larger one",
                                   granularity));
        }
        Bitmap bitmap;
        bitmap.entry.table_entries = static_cast<std::uint32_t>(entries);
        bitmap.entry.granularity_bits = static_cast<unsigned>(std::countr_zero(granularity));
        bitmap.entry.info = {.name = action.bitmap, .granularity = granularity};
        bitmap.encoded = encode_bitmap(bitmap.entry);
        bitmap.set_enabled(true);
        bitmap.new_words.emplace(entries);
        keep(std::move(bitmap));
        return {};
    }

    Result<void> remove(Position bitmap) {
        TRY_VOID(drop_bits(*bitmap));
        drop_table(*bitmap);
        by_name_.erase(by_name_.lower_bound(bitmap->entry.info.name));
        bitmaps_.erase(bitmap);
        return {};
    }

    Result<void> clear(Bitmap& bitmap) {
        TRY_VOID(drop_bits(bitmap));
        drop_table(bitmap);
        bitmap.new_words.emplace(bitmap.entry.table_entries);
        return {};
    }

    /// A new table for a bitmap, with the clusters of bits that change.
    Result<void> merge(Bitmap& target, const BitmapAction& action) {
        auto words = TRY(words_of(target));
        const std::uint64_t bits_per_entry = cluster_size() * 8;
        std::optional<std::uint64_t> index;  // of the entry whose bits are in memory
        std::vector<std::byte> before;
        std::vector<std::byte> bits;
        const auto store = [&]() -> Result<void> {
            if (!index || bits == before) return {};
            const format::BitmapTableEntry old{words[*index]};
            if (old.cluster().value != 0) change_.drop_table(old.cluster(), cluster_size());
            words[*index] = TRY(write(bits)).value;
            return {};
        };
        const auto load = [&](std::uint64_t wanted) -> Result<void> {
            if (index == wanted) return {};
            TRY_VOID(store());
            index = wanted;
            const format::BitmapTableEntry entry{words[wanted]};
            before.assign(cluster_size(), entry.all_ones() ? std::byte{0xff} : std::byte{0});
            if (entry.cluster().value != 0) TRY(metadata_.file().read(entry.cluster(), before));
            bits = before;
            return {};
        };
        const auto set = [&](const DirtyRun& run) -> Result<void> {
            if (!run.dirty) return {};
            const std::uint64_t last = (run.start.value + run.length - 1) >> target.entry.granularity_bits;
            for (std::uint64_t n = run.start.value >> target.entry.granularity_bits; n <= last;) {
                TRY_VOID(load(n / bits_per_entry));
                const std::uint64_t end = std::min(last + 1, (*index + 1) * bits_per_entry);
                set_bits(bits, n % bits_per_entry, end - *index * bits_per_entry);
                n = end;
            }
            return {};
        };
        TRY_VOID(each_dirty_of(action, set));
        TRY_VOID(store());
        drop_table(target);
        target.new_words = std::move(words);
        return {};
    }

    Result<std::vector<std::uint64_t>> words_of(const Bitmap& bitmap) {
        if (bitmap.new_words) return *bitmap.new_words;
        return load_words(metadata_, bitmap.entry.table, bitmap.entry.table_entries);
    }

    Result<void> each_dirty_of(const BitmapAction& action, const std::function<Result<void>(const DirtyRun&)>& visit) {
        if (action.source_image) {
            auto& image = *action.source_image;
            if (image.size() != state_.size) {
                return fail(Errc::invalid_argument, place_of(action.bitmap),
                            fmt::format("its disk has {} bytes, and that of bitmap \"{}\" {}; resize one of them",
                                        state_.size, printable(action.source), image.size()));
            }
            return image.each_dirty(action.source, {0}, state_.size, visit);
        }
        const auto source = TRY(find(action.source));
        TRY_VOID(verify_usable(*source));
        TRY_VOID(write_table(*source));
        return each_dirty_run(metadata_, source->entry, nullptr, {0}, state_.size, visit);
    }

    static void set_bits(std::span<std::byte> bits, std::uint64_t begin, std::uint64_t end) {
        while (begin < end) {
            if (begin % 8 == 0 && end - begin >= 8) {
                const std::uint64_t bytes = (end - begin) / 8;
                std::ranges::fill(bits.subspan(begin / 8, bytes), std::byte{0xff});
                begin += bytes * 8;
            } else {
                bits[begin / 8] |= std::byte{1} << begin % 8;
                ++begin;
            }
        }
    }

    /// Of a damaged entry, nobody knows what it leads to. That stays counted.
    Result<void> drop_bits(const Bitmap& bitmap) {
        for (std::uint64_t index = 0; index < bitmap.entry.table_entries; ++index) {
            const auto entry = bitmap.new_words ? format::BitmapTableEntry{(*bitmap.new_words)[index]}
                                                : bitmap_table_entry(metadata_, bitmap.entry, index);
            if (!entry && entry.error().code != Errc::corrupt) return std::unexpected(entry.error());
            if (entry && entry->cluster().value != 0) change_.drop_table(entry->cluster(), cluster_size());
        }
        return {};
    }

    void drop_table(const Bitmap& bitmap) {
        const std::uint64_t bytes = std::uint64_t{bitmap.entry.table_entries} * 8;
        if (bytes != 0 && !bitmap.new_words) change_.drop_table(bitmap.entry.table, bytes);
    }

    Result<void> write_table(Bitmap& bitmap) {
        if (!bitmap.new_words) return {};
        const auto& words = *bitmap.new_words;
        bitmap.set_table(TRY(write(encode_words(words, words.size() * 8))));
        return {};
    }

    /// Writes this to new clusters, with zeros up to the end of the last one.
    Result<HostOffset> write(std::vector<std::byte> bytes) {
        const std::uint64_t clusters = divide_up(bytes.size(), cluster_size());
        bytes.resize(clusters * cluster_size());
        const HostOffset at = TRY(change_.take_table(MetadataMap::Kind::bitmaps, clusters));
        TRY_VOID(metadata_.file().write(at, bytes));
        return at;
    }

    [[nodiscard]] std::uint64_t cluster_size() const { return metadata_.cluster_size(); }

    WritableMetadata& writable_;
    const Metadata& metadata_;
    const std::string name_ = metadata_.file().name();
    const format::HeaderState state_;
    Change change_;
    std::list<Bitmap> bitmaps_;                          // in the order of the directory
    std::multimap<std::string_view, Position> by_name_;  // a damaged image may have a name twice: the first one counts
};

}  // namespace

Result<void> change_bitmaps(WritableMetadata& writable, std::span<const BitmapAction> actions) {
    const auto& metadata = writable.metadata();
    if (metadata.header().version < 3) {
        return fail(Errc::unsupported, metadata.file().name(),
                    "version 2 has no bitmaps; qcow amend -o compat=1.1 IMAGE makes it version 3");
    }
    BitmapChanges changes(writable);
    TRY_VOID(changes.load());
    for (const auto& action : actions) TRY_VOID(changes.apply(action));
    return changes.commit();
}

}  // namespace qcow::qcow2
