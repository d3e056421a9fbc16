#include "qcow2/writer.h"

#include <algorithm>

#include "base/try.h"
#include "qcow2/bitmap_changes.h"
#include "qcow2/held_requests.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t zero_piece_bytes = 1 * GiB;  // at least, after which what was dropped may be freed

}  // namespace

Writer::Writer(std::shared_ptr<ImageParts> parts, View& active, const WriteOptions& options)
    : metadata_(parts->metadata, parts->data.to_flush(), options),
      parts_(std::move(parts)),
      active_(active),
      bitmaps_(metadata_),
      mapping_(metadata_, active.mapping()),
      writes_(metadata_, *parts_, active, mapping_),
      zeroing_(metadata_, *parts_, mapping_, writes_),
      compressed_(metadata_, mapping_, writes_),
      resizing_(metadata_, *parts_, mapping_, zeroing_, bitmaps_),
      snapshots_(metadata_, *parts_, mapping_, bitmaps_, gate_),
      verifies_refcounts_(options.verify_refcounts),
      discards_(options.discard) {
    active_.on_damage([this](Error damage) { return metadata_.declare_corrupt(std::move(damage)); });
    parts_->data.protect(&metadata_);
}

Writer::~Writer() {
    parts_->data.protect(nullptr);
    active_.on_damage({});
}

Result<void> Writer::open() {
    TRY_VOID(active_.verify_readable());
    const auto state = parts_->metadata.state();
    if (parts_->data.is_encrypted() && parts_->data.is_raw()) {
        return fail(
            Errc::unsupported, parts_->metadata.file().name(),
            "its external data file is raw and encrypted, so other programs read something else than the guest; "
            "it is only read");
    }
    TRY_VOID(format::verify_not_marked_corrupt(state));
    TRY_VOID(metadata_.load());
    TRY_VOID(bitmaps_.load());
    if (state.has(format::incompatible::dirty)) return rebuild();
    return verifies_refcounts_ ? metadata_.verify_refcounts() : Result<void>();
}

/// Counts what an image that is marked as dirty refers to.
Result<void> Writer::rebuild() {
    TRY_VOID(clear_unknown_features());
    TRY_VOID(metadata_.rebuild_refcounts());
    recounted_ = true;
    TRY_VOID(mapping_.correct_copied_flags());
    return metadata_.end_rebuild();
}

/// A request that changes the image.
template <class Work>
Result<void> Writer::request(Work&& work) {
    const RequestGate::Pass pass(gate_);
    return metadata_.attempt(std::forward<Work>(work));
}

/// Comes before every change, of these guest bytes.
Result<void> Writer::begin(GuestOffset at, std::uint64_t length, Contents contents) {
    TRY_VOID(begin_whole());
    return contents == Contents::change ? bitmaps_.record(at, length) : Result<void>();
}

/// Comes before every change that is not one of guest bytes, or sees to the bitmaps itself.
Result<void> Writer::begin_whole() {
    TRY_VOID(metadata_.verify_writable());
    return begun_.load(std::memory_order_acquire) ? Result<void>() : begin_first();
}

/// What has to be on disk before the first change is.
Result<void> Writer::begin_first() {
    const std::lock_guard lock(begin_mutex_);
    if (begun_) return {};
    TRY_VOID(clear_unknown_features());
    begun_.store(true, std::memory_order_release);
    return {};
}

/// Features that are not known may depend on what is about to change.
Result<void> Writer::clear_unknown_features() {
    const auto state = parts_->metadata.state();
    std::uint64_t kept = parts_->data.is_external() ? format::autoclear::raw_external_data : 0;
    if (state.bitmaps_consistent()) kept |= format::autoclear::bitmaps;
    if ((state.autoclear & ~kept) == 0) return {};
    return metadata_.change_header([&](format::HeaderState& changed) { changed.autoclear &= kept; });
}

Result<void> Writer::write(GuestOffset at, ConstBuffers from, Contents contents) {
    return request([&]() -> Result<void> {
        TRY_VOID(begin(at, from.size(), contents));
        TRY_VOID(writes_.write(at, from));
        return metadata_.flush_if_full();
    });
}

Result<void> Writer::write_zeroes(GuestOffset at, std::uint64_t length, Disk::Zeroes zeroes, Contents contents) {
    return zero(at, length, zeroes == Disk::Zeroes::keep ? Zeroing::Mode::keep : Zeroing::Mode::release, contents);
}

Result<void> Writer::discard(GuestOffset at, std::uint64_t length) {
    return zero(at, length, Zeroing::Mode::discard, Contents::change);
}

/// In pieces, since a scattered disk drops as many runs as it has clusters.
Result<void> Writer::zero(GuestOffset at, std::uint64_t length, Zeroing::Mode mode, Contents contents) {
    return request([&]() -> Result<void> {
        TRY_VOID(begin(at, length, contents));
        const std::uint64_t piece = std::max(zero_piece_bytes, parts_->metadata.geometry().l2_coverage());
        while (length > 0) {
            const auto part = std::min(length, piece - at.value % piece);
            TRY_VOID(zeroing_.zero(at, part, mode));
            TRY_VOID(metadata_.flush_if_full());
            at += part;
            length -= part;
        }
        return {};
    });
}

Result<void> Writer::write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level,
                                      Contents contents) {
    TRY_VOID(compressed_.verify(at, from.size()));
    const auto compressor =
        TRY(within_memory([&] { return codec::make_compressor(parts_->metadata.header().compression, level); }));
    return request([&]() -> Result<void> {
        TRY_VOID(begin(at, from.size(), contents));
        TRY_VOID(compressed_.write(at, from, *compressor));
        return metadata_.flush_if_full();
    });
}

/// A change of the whole image. Others wait for it; requests need not.
template <class Work>
std::invoke_result_t<Work> Writer::change_whole(Work&& work) {
    const std::lock_guard lock(whole_mutex_);
    return metadata_.attempt([&]() -> std::invoke_result_t<Work> {
        TRY_VOID(begin_whole());
        return work();
    });
}

Result<void> Writer::resize(std::uint64_t size) {
    TRY_VOID(resizing_.verify(size));
    return change_whole([&] {
        const RequestGate::Pass pass(gate_);
        dropped_tables_ |= size < parts_->metadata.disk_size();
        return resizing_.resize(size);
    });
}

Result<void> Writer::make_empty() {
    auto& metadata = parts_->metadata;
    if (parts_->data.is_raw()) {
        return fail(Errc::unsupported, metadata.file().name(),
                    "a raw external data file holds the whole disk, so that the image cannot be emptied");
    }
    return change_whole([&]() -> Result<void> {
        const RequestGate::Pass pass(gate_);
        dropped_tables_ = true;
        const std::uint64_t tables = metadata.state().l1_entries;
        for (std::uint64_t table = 0; table < tables; ++table) {
            TRY_VOID(mapping_.drop_table(table * metadata.geometry().l2_entries()));
            TRY_VOID(metadata_.flush_if_full());
        }
        TRY_VOID(metadata_.flush());
        if (!parts_->data.is_external() || !discards_) return {};
        metadata_.wait_for_requests();
        return parts_->data.write_zeroes({0}, metadata.disk_size());
    });
}

Result<SnapshotInfo> Writer::create_snapshot(const std::string& name) {
    return change_whole([&] { return snapshots_.create(name); });
}

Result<void> Writer::apply_snapshot(std::string_view id_or_name) {
    return change_whole([&] { return snapshots_.apply(id_or_name); });
}

Result<void> Writer::remove_snapshot(std::string_view id_or_name) {
    return change_whole([&] { return snapshots_.remove(id_or_name); });
}

Result<void> Writer::rename_snapshot(std::string_view id_or_name, const std::string& name) {
    return change_whole([&] { return snapshots_.rename(id_or_name, name); });
}

Result<void> Writer::complete_snapshots() {
    return change_whole([&] { return snapshots_.complete(); });
}

Result<void> Writer::change_backing(const std::string& name, std::optional<Format> format) {
    const auto bad = [](const char* what) { return fail(Errc::invalid_argument, "backing file", what); };
    if (name.size() > format::max_name_length) return bad("its name is longer than 1023 bytes");
    if (!name.empty() && parts_->data.is_raw())
        return bad("a raw external data file holds the whole disk, so that the image can have none");
    return request([&]() -> Result<void> {
        TRY_VOID(begin_whole());
        TRY_VOID(flush());  // what was copied from the old one
        return metadata_.edit_header([&](format::HeaderEdit& header, format::HeaderState&) {
            using enum format::ExtensionType;
            header.set_backing_name(name);
            if (name.empty() || !format) {
                header.remove_extension(backing_format);
            } else {
                header.set_extension(backing_format, as_bytes(format_name(*format)));
            }
        });
    });
}

Result<void> Writer::change_bitmaps(std::span<const BitmapAction> actions) {
    const std::lock_guard lock(whole_mutex_);
    return metadata_.attempt([&]() -> Result<void> {
        TRY_VOID(metadata_.verify_writable());
        const auto held = TRY(HeldRequests::hold(gate_, parts_->metadata.file().name()));
        TRY_VOID(begin_first());
        TRY_VOID(save_bitmaps());
        TRY_VOID(qcow2::change_bitmaps(metadata_, actions));
        // Without the list of bitmaps, changes of the disk would not be recorded.
        auto loaded = bitmaps_.load();
        return loaded ? loaded : metadata_.stop(std::move(loaded).error());
    });
}

/// Flushes, and takes the marks off the bitmaps. No other request is in flight.
Result<void> Writer::save_bitmaps() {
    auto saved = bitmaps_.save();
    TRY_VOID(flush());
    return saved ? bitmaps_.clear_in_use() : saved;
}

Result<void> Writer::survive_in(SurvivingMemory memory) {
    const std::lock_guard lock(whole_mutex_);
    return metadata_.attempt([&]() -> Result<void> {
        TRY_VOID(metadata_.verify_writable());
        const auto& file = parts_->metadata.file().name();
        const auto held = TRY(HeldRequests::hold(gate_, file));
        // What this process keeps to itself. If it is kept in this memory, that has nothing then.
        TRY_VOID(metadata_.write_changes());
        const auto left = RedoLog::read(memory.bytes);
        if (!left.empty() && begun_) {
            return fail(Errc::invalid_argument, file,
                        "it was written before its guest came back, so what the guest wrote last, and did not flush, "
                        "is lost; restart the guest");
        }
        if (!left.empty()) TRY_VOID(metadata_.redo(left, recounted_));
        // The file has it now. If this process is killed, too, the next one finds an image that is marked as dirty.
        metadata_.record_in(std::move(memory));
        return left.empty() ? Result<void>() : rebuild();
    });
}

Result<void> Writer::expand_zeroes() {
    return change_whole([&]() -> Result<void> {
        const RequestGate::Pass pass(gate_);
        const std::uint64_t size = parts_->metadata.disk_size();
        for (GuestOffset at; at.value < size;) {
            at += TRY(zeroing_.expand(at, size - at.value));
            TRY_VOID(metadata_.flush_if_full());
        }
        return metadata_.flush();
    });
}

Result<void> Writer::settle() {
    return metadata_.attempt([&]() -> Result<void> {
        auto saved = save_bitmaps();
        TRY_VOID(metadata_.verify_writable());
        TRY_VOID(metadata_.give_back());
        return saved;
    });
}

Result<void> Writer::cut_file() { return dropped_tables_ ? metadata_.cut_file() : Result<void>(); }

}  // namespace qcow::qcow2
