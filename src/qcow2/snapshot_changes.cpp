#include "qcow2/snapshot_changes.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "base/try.h"
#include "qcow/text.h"
#include "qcow2/held_requests.h"
#include "qcow2/l1_references.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {
namespace {

// QEMU keeps names in 256 bytes.
constexpr std::size_t max_snapshot_name = 255;

Result<void> verify_name(const std::string& name) {
    if (name.contains('\0'))
        return fail(Errc::invalid_argument, fmt::format("snapshot name \"{}\"", printable(name)), "it has a zero byte");
    if (!name.empty() && name.size() <= max_snapshot_name) return {};
    return fail(Errc::invalid_argument, fmt::format("snapshot name \"{}\"", printable(name)),
                fmt::format("it has {} bytes, and names have 1 to {}", name.size(), max_snapshot_name));
}

std::uint64_t number_of(std::string_view id) {
    std::uint64_t number = 0;
    std::from_chars(id.data(), id.data() + id.size(), number);
    return number;
}

}  // namespace

struct SnapshotChanges::Table {
    std::vector<format::SnapshotEntry> entries;
    std::vector<std::vector<std::byte>> encoded;  // of each entry: fields that are not known stay as they are
};

Result<void> SnapshotChanges::verify_supported() const {
    if (!parts_.data.is_external()) return {};
    return fail(Errc::unsupported, metadata_.metadata().file().name(),
                "an image with an external data file cannot have internal snapshots; make an overlay instead: qcow "
                "create -b IMAGE -F qcow2 OVERLAY");
}

Result<SnapshotChanges::Table> SnapshotChanges::load() const {
    const auto& metadata = metadata_.metadata();
    auto read = TRY(read_snapshots(metadata));
    std::vector<std::byte> bytes(read.bytes);
    bytes.resize(TRY(metadata.file().read(metadata.state().snapshot_table, bytes)));
    Table table{std::move(read.entries), {}};
    auto rest = std::span<const std::byte>(bytes);
    for (const auto& entry : table.entries) {
        const auto encoded = rest.first(std::min(entry.encoded_bytes, rest.size()));
        table.encoded.emplace_back(encoded.begin(), encoded.end());
        table.encoded.back().resize(divide_up(encoded.size(), 8) * 8);
        rest = rest.subspan(encoded.size());
    }
    return table;
}

Result<std::size_t> SnapshotChanges::find(const Table& table, std::string_view id_or_name) const {
    const auto found = find_snapshots(table.entries, id_or_name);
    const auto place = fmt::format("{}: snapshot \"{}\"", metadata_.metadata().file().name(), printable(id_or_name));
    if (found.empty())
        return fail(Errc::not_found, place, "there is none of this id or name; qcow snapshot --list shows all");
    if (found.size() == 1) return found.front();
    std::string all;
    for (const auto i : found) {
        const auto& info = table.entries[i].info;
        all += fmt::format("{}id {} (\"{}\")", all.empty() ? "" : ", ", printable(info.id), printable(info.name));
    }
    return fail(Errc::invalid_argument, place,
                fmt::format("it is not clear which one is meant: {}; give the id of one", all));
}

Result<void> SnapshotChanges::set_dirty(bool dirty) {
    if (metadata_.metadata().header().version < 3) return {};
    return metadata_.change_header([&](format::HeaderState& state) { mark(state, dirty); });
}

void SnapshotChanges::mark(format::HeaderState& state, bool dirty) const {
    if (metadata_.metadata().header().version < 3) return;
    state.incompatible &= ~format::incompatible::dirty;
    if (dirty || incomplete_) state.incompatible |= format::incompatible::dirty;
}

Result<void> SnapshotChanges::remove_references(std::span<const std::uint64_t> l1) {
    auto removed = qcow2::remove_references(metadata_, l1);
    incomplete_ |= !removed;
    return removed;
}

Result<void> SnapshotChanges::settle() {
    const auto correct = [&]() -> Result<void> {
        TRY_VOID(mapping_.correct_copied_flags());
        return metadata_.write_changes();
    };
    auto corrected = correct();
    incomplete_ |= !corrected;
    return corrected ? set_dirty(false) : corrected;
}

Result<std::vector<std::byte>> SnapshotChanges::join(std::span<const std::vector<std::byte>> entries) const {
    std::vector<std::byte> bytes;
    for (const auto& entry : entries) bytes.insert(bytes.end(), entry.begin(), entry.end());
    if (entries.size() <= format::max_snapshots && bytes.size() <= format::max_snapshot_table_bytes) return bytes;
    return fail(Errc::limit_exceeded, metadata_.metadata().file().name(),
                fmt::format("a snapshot table has at most {} entries and {} bytes; remove snapshots first",
                            format::max_snapshots, format::max_snapshot_table_bytes));
}

Result<void> SnapshotChanges::commit(Change& change, std::span<const std::vector<std::byte>> entries, bool dirty) {
    auto& metadata = metadata_.metadata();
    const auto old = metadata.state();
    const std::uint64_t old_bytes = TRY(read_snapshots(metadata)).bytes;
    const auto bytes = TRY(join(entries));
    HostOffset table;
    if (!bytes.empty()) {
        table = TRY(change.take_table(MetadataMap::Kind::snapshots, divide_up(bytes.size(), metadata.cluster_size())));
        TRY_VOID(metadata.file().write(table, bytes));
    }
    TRY_VOID(metadata_.write_changes());
    if (old_bytes != 0) change.drop_table(old.snapshot_table, old_bytes);
    return change.commit_header([&](format::HeaderState& state) {
        state.snapshot_table = table;
        state.snapshot_count = static_cast<std::uint32_t>(entries.size());
        mark(state, dirty);
    });
}

/// Writes the L1 table of a new snapshot, with the disk as it is at a point between requests, and counts its
/// references.
Result<void> SnapshotChanges::copy_mapping(HostOffset to, std::uint64_t bytes) {
    std::optional<Epochs::Guard> keep_dropped;
    std::vector<std::uint64_t> l1;
    {
        const auto held = TRY(HeldRequests::hold(gate_, metadata_.metadata().file().name()));
        // What requests drop from now on may be the snapshot's.
        keep_dropped.emplace(metadata_.epochs());
        l1 = TRY(mapping_.share_tables());
    }
    TRY_VOID(metadata_.metadata().file().write(to, encode_words(l1, bytes)));
    return add_references(metadata_, l1);
}

Result<SnapshotInfo> SnapshotChanges::create(const std::string& name) {
    TRY_VOID(verify_supported());
    TRY_VOID(verify_name(name));
    auto& metadata = metadata_.metadata();
    auto table = TRY(load());
    const auto state = metadata.state();
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const auto seconds = std::chrono::floor<std::chrono::seconds>(now);
    std::uint64_t last_id = 0;
    for (const auto& other : table.entries) last_id = std::max(last_id, number_of(other.info.id));
    format::SnapshotEntry entry;
    entry.l1_entries = state.l1_entries;
    entry.info.id = fmt::format("{}", last_id + 1);
    entry.info.name = name;
    entry.info.date_seconds = static_cast<std::uint64_t>(seconds.count());
    entry.info.date_nanoseconds = static_cast<std::uint32_t>(std::chrono::nanoseconds(now - seconds).count());
    entry.info.virtual_size = state.size;
    table.encoded.push_back(format::encode_snapshot(entry));
    TRY(join(table.encoded));  // before all tables of the disk are counted

    const std::uint64_t l1_bytes = std::max<std::uint64_t>(1, state.l1_entries) * 8;
    const std::uint64_t clusters = divide_up(l1_bytes, metadata.cluster_size());
    TRY_VOID(set_dirty(true));
    Change change(metadata_);
    const auto attempt = [&]() -> Result<void> {
        entry.l1_table = TRY(change.take_table(MetadataMap::Kind::snapshots, clusters));
        TRY_VOID(copy_mapping(entry.l1_table, clusters * metadata.cluster_size()));
        table.encoded.back() = format::encode_snapshot(entry);
        auto committed = commit(change, table.encoded, false);
        if (committed) return {};
        const auto l1 = TRY(load_words(metadata, entry.l1_table, state.l1_entries));
        TRY_VOID(remove_references(l1));
        return committed;
    };
    if (auto made = attempt(); !made) {
        // The image stays marked as dirty if this fails, too.
        static_cast<void>(settle());
        return std::unexpected(std::move(made).error());
    }
    return entry.info;
}

Result<void> SnapshotChanges::remove(std::string_view id_or_name) {
    TRY_VOID(verify_supported());
    auto& metadata = metadata_.metadata();
    auto table = TRY(load());
    const auto index = TRY(find(table, id_or_name));
    const auto entry = table.entries[index];
    TRY_VOID(verify_snapshot_l1(metadata, entry));
    const auto l1 = TRY(load_words(metadata, entry.l1_table, entry.l1_entries));
    table.encoded.erase(table.encoded.begin() + static_cast<std::ptrdiff_t>(index));
    Change change(metadata_);
    TRY_VOID(commit(change, table.encoded, true));
    parts_.open_snapshots.remove(entry.l1_table);
    metadata_.wait_for_requests();
    // The mapping first: the table is read no more then.
    TRY_VOID(remove_references(l1));
    const std::uint64_t clusters = divide_up(l1.size() * 8, metadata.cluster_size());
    const std::uint64_t first = entry.l1_table.value >> metadata.header().cluster_bits;
    if (clusters != 0) {
        auto removed = metadata_.remove_reference({first, clusters}, true);
        incomplete_ |= !removed;
        TRY_VOID(removed);
    }
    return settle();
}

Result<void> SnapshotChanges::rename(std::string_view id_or_name, const std::string& name) {
    TRY_VOID(verify_supported());
    TRY_VOID(verify_name(name));
    auto table = TRY(load());
    const auto index = TRY(find(table, id_or_name));
    table.encoded[index] = format::rename_snapshot(table.encoded[index], name);
    Change change(metadata_);
    return commit(change, table.encoded, false);
}

Result<void> SnapshotChanges::complete() {
    auto table = TRY(load());
    bool changed = false;
    for (std::size_t i = 0; i < table.entries.size(); ++i) {
        if (table.entries[i].extra_bytes >= format::min_snapshot_extra_bytes) continue;
        table.encoded[i] = format::encode_snapshot(table.entries[i]);
        changed = true;
    }
    if (!changed) return {};
    Change change(metadata_);
    return commit(change, table.encoded, false);
}

Result<void> SnapshotChanges::apply(std::string_view id_or_name) {
    TRY_VOID(verify_supported());
    auto& metadata = metadata_.metadata();
    const auto table = TRY(load());
    const auto& entry = table.entries[TRY(find(table, id_or_name))];
    TRY_VOID(verify_snapshot_l1(metadata, entry));
    const auto held = TRY(HeldRequests::hold(gate_, metadata.file().name()));
    // What the disk has dropped may become the disk's again, and is not to be counted twice then: it is freed first.
    TRY_VOID(metadata_.flush());
    metadata_.wait_for_requests();
    TRY_VOID(metadata_.flush());
    const std::uint64_t old_size = metadata.state().size;
    const std::uint64_t size = entry.info.virtual_size;
    // Whether all of it succeeds or not: the bitmaps must not miss what changes.
    TRY_VOID(bitmaps_.record({0}, old_size));
    if (size != old_size) TRY_VOID(bitmaps_.begin_resize(size));
    auto applied = switch_to(entry);
    if (size == old_size) return applied;
    const bool switched = metadata.state().size == size;
    auto recorded = switched ? bitmaps_.finish_resize(size) : bitmaps_.cancel_resize();
    metadata.publish_size();
    if (recorded && switched) recorded = bitmaps_.record({0}, size);
    return applied ? recorded : applied;
}

/// Makes a snapshot's mapping the active one. No request that changes the image is in flight.
Result<void> SnapshotChanges::switch_to(const format::SnapshotEntry& snapshot) {
    auto& metadata = metadata_.metadata();
    const auto old = metadata.state();
    const auto old_l1 = TRY(load_words(metadata, old.l1_table, old.l1_entries));
    auto l1 = TRY(load_words(metadata, snapshot.l1_table, snapshot.l1_entries));
    // A VM state lies behind the end of the disk. Who resumes it applies the snapshot, too.
    const auto tables = divide_up(snapshot.info.virtual_size, metadata.geometry().l2_coverage());
    l1.resize(std::min<std::uint64_t>(l1.size(), tables));
    for (auto& word : l1) word &= ~format::copied_bit;
    TRY_VOID(set_dirty(true));
    const auto attempt = [&]() -> Result<void> {
        TRY_VOID(add_references(metadata_, l1));
        // Requests that read may still reach to the end of the old size.
        const std::uint64_t entries = std::max({std::size_t{1}, l1.size(), old_l1.size()});
        const std::uint64_t clusters = divide_up(entries * 8, metadata.cluster_size());
        Change change(metadata_);
        const auto commit = [&]() -> Result<void> {
            const HostOffset at = TRY(change.take_table(MetadataMap::Kind::l1_table, clusters));
            TRY_VOID(metadata.file().write(at, encode_words(l1, clusters * metadata.cluster_size())));
            TRY_VOID(metadata_.write_changes());
            if (old.l1_entries != 0) change.drop_table(old.l1_table, std::uint64_t{old.l1_entries} * 8);
            return change.commit_header([&](format::HeaderState& state) {
                state.l1_table = at;
                state.l1_entries = static_cast<std::uint32_t>(entries);
                state.size = snapshot.info.virtual_size;
            });
        };
        auto committed = commit();
        if (!committed) TRY_VOID(remove_references(l1));
        return committed;
    };
    if (auto done = attempt(); !done) {
        // The image stays marked as dirty if this fails, too.
        static_cast<void>(settle());
        return done;
    }
    metadata.publish_size();
    metadata_.wait_for_requests();
    TRY_VOID(remove_references(old_l1));
    return settle();
}

}  // namespace qcow::qcow2
