#include "qcow1/qcow1_image.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "codec/codec.h"
#include "disk/backing_file.h"
#include "disk/compressed.h"
#include "disk/encrypted.h"
#include "disk/range.h"
#include "format/file_name.h"
#include "format/qcow1.h"
#include "luks/volume.h"
#include "storage/word_cache.h"

namespace qcow::qcow1 {
namespace {

using format::Qcow1Entry;

/// A run of guest bytes within one L2 table; `entry` is the first cluster's.
struct Mapped {
    Qcow1Entry entry;
    std::uint64_t length = 0;
};

class Qcow1Image final : public Layer {
public:
    Qcow1Image(format::Qcow1Header header, std::string backing_name, std::shared_ptr<Storage> file,
               std::shared_ptr<Layer> backing, bool alone, std::size_t cache_bytes,
               std::shared_ptr<const crypto::SectorCipher> cipher)
        : header_(header),
          backing_name_(std::move(backing_name)),
          file_(std::move(file)),
          backing_(std::move(backing), alone ? std::string() : backing_name_),
          words_(file_, 512, cache_bytes),
          encryption_(cipher ? std::make_unique<EncryptedBytes>(std::move(cipher)) : nullptr) {}

    [[nodiscard]] std::uint64_t size() const override { return header_.size; }
    [[nodiscard]] Format format() const override { return Format::qcow; }
    [[nodiscard]] std::uint64_t block_size() const override { return header_.cluster_size(); }
    [[nodiscard]] std::shared_ptr<Image> backing() const override { return backing_.image(); }
    [[nodiscard]] const BackingFile* backing_file() const override { return &backing_; }
    void exchange_backing(std::shared_ptr<Layer> image) override { backing_.exchange(std::move(image)); }

    [[nodiscard]] Result<void> verify_readable() const override {
        return header_.encrypted && !encryption_ ? no_key(file_->name()) : Result<void>();
    }

    Result<Part> read_part(GuestOffset at, Buffers to) const override {
        TRY_VOID(verify_readable());
        const auto mapped = TRY(lookup(at, to.size()));
        if (!mapped.entry.allocated()) return Part{mapped.length, false};
        if (!mapped.entry.compressed()) {
            TRY_VOID(read_data(mapped.entry.cluster() + offset_in_cluster(at), at, to.first(mapped.length)));
            return Part{mapped.length};
        }
        const std::uint64_t skip = offset_in_cluster(at);
        const std::uint64_t length = std::min(mapped.length, header_.cluster_size() - skip);
        const auto range = mapped.entry.compressed_range(header_.cluster_bits);
        auto done = read_compressed(*file_, range, codec::inflate, header_.cluster_size(), skip, to.first(length));
        if (!done) return unreadable(std::move(done).error(), at, length);
        return Part{length};
    }

    [[nodiscard]] Result<Extent> own_extent(GuestOffset at, std::uint64_t limit) const override {
        const auto mapped = TRY(lookup(at, limit));
        Extent extent;
        extent.start = at;
        extent.length = mapped.length;
        if (!mapped.entry.allocated()) return extent;
        extent.kind = Extent::Kind::data;
        extent.compressed = mapped.entry.compressed();
        if (!extent.compressed && !header_.encrypted) {
            extent.host = mapped.entry.cluster() + offset_in_cluster(at);
            extent.storage = file_.get();
        }
        return extent;
    }

    [[nodiscard]] std::vector<std::string> files() const override { return {file_->name()}; }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        TRY_VOID(verify_readable());
        if (to.empty()) return backing_.verify_readable();
        while (!to.empty()) {
            const auto part = TRY(read_part(at, to));
            if (!part.held) TRY_VOID(backing_.read(at, to.first(part.length)));
            at += part.length;
            to = to.subspan(part.length);
        }
        return {};
    }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        const auto extent = TRY(own_extent(at, limit));
        return extent.kind == Extent::Kind::unallocated ? backing_.extent(at, extent.length) : extent;
    }

    [[nodiscard]] Result<ImageInfo> do_info() const override {
        ImageInfo info;
        info.filename = file_->name();
        info.format = Format::qcow;
        info.virtual_size = header_.size;
        info.file_size = TRY(file_->size());
        info.disk_size = TRY(file_->allocated());
        info.version = 1;
        info.cluster_size = header_.cluster_size();
        info.compression = "zlib";
        if (header_.encrypted) info.encryption = EncryptionInfo{"aes", "aes-cbc-plain64", "", 128, 0, {}};
        if (!backing_name_.empty()) {
            info.backing = ReferenceInfo{backing_name_, "", ""};
            if (const auto parsed = format::parse_file_name(backing_name_))
                info.backing->path = format::resolve(parsed->path, file_->name());
        }
        return info;
    }

private:
    [[nodiscard]] std::uint64_t offset_in_cluster(GuestOffset at) const {
        return at.value & low_bits(header_.cluster_bits);
    }

    [[nodiscard]] Result<Mapped> lookup(GuestOffset at, std::uint64_t limit) const {
        const std::uint64_t file_size = TRY(file_->size());
        const HostOffset l1_at = header_.l1_table + at.value / header_.l2_coverage() * 8;
        const std::uint64_t rest_of_table = header_.l2_coverage() - at.value % header_.l2_coverage();
        auto word = load_word(l1_at, file_size, "L1");
        if (!word) return unreadable(std::move(word).error(), at, std::min(limit, rest_of_table));
        const HostOffset table{*word};
        if (table.value == 0) return Mapped{{}, std::min(limit, rest_of_table)};
        const std::uint64_t index = at.value >> header_.cluster_bits & low_bits(header_.l2_bits);
        const std::uint64_t wanted =
            std::min(divide_up(offset_in_cluster(at) + std::min(limit, header_.l2_coverage()), header_.cluster_size()),
                     bit(header_.l2_bits) - index);
        Mapped mapped;
        std::uint64_t count = 0;
        for (; count < wanted; ++count) {
            const HostOffset entry_at = table + (index + count) * 8;
            auto entry_word = load_word(entry_at, file_size, "L2");
            if (!entry_word && count != 0) break;  // of those before it, the extent is known
            if (!entry_word) {
                const bool past_the_end = entry_at.value >= file_size;
                const std::uint64_t rest_of_cluster = header_.cluster_size() - offset_in_cluster(at);
                return unreadable(std::move(entry_word).error(), at,
                                  std::min(limit, past_the_end ? rest_of_table : rest_of_cluster));
            }
            const Qcow1Entry entry{*entry_word};
            if (count == 0) {
                mapped.entry = entry;
                // Read one by one anyway: looking further each time would take time squared.
                if (entry.compressed()) {
                    count = 1;
                    break;
                }
            } else if (!continues(mapped.entry, entry, count)) {
                break;
            }
        }
        mapped.length = std::min(limit, count * header_.cluster_size() - offset_in_cluster(at));
        return mapped;
    }

    [[nodiscard]] bool continues(Qcow1Entry first, Qcow1Entry next, std::uint64_t distance) const {
        if (!first.allocated()) return !next.allocated();
        return next.word == first.word + distance * header_.cluster_size();
    }

    /// A word of a table, which in this format need not be aligned to anything.
    [[nodiscard]] Result<std::uint64_t> load_word(HostOffset at, std::uint64_t file_size,
                                                  std::string_view table) const {
        if (!lies_within(at.value, 8, file_size)) {
            return fail(
                Errc::corrupt, file_->name(),
                fmt::format(
                    "an {} entry at host offset {:#x} would lie past the end of the file ({} bytes): the file was cut",
                    table, at.value, file_size));
        }
        if (!lies_within(at.value, 8, format::max_host_offset))
            return fail(Errc::corrupt, file_->name(), fmt::format("an {} entry at host offset {:#x}", table, at.value));
        const auto shift = static_cast<unsigned>(at.value % 8) * 8;
        const HostOffset aligned{at.value - at.value % 8};
        const auto high = TRY(words_.load(aligned));
        if (shift == 0) return high;
        return high << shift | TRY(words_.load(aligned + 8)) >> (64 - shift);
    }

    [[nodiscard]] Result<void> read_data(HostOffset host, GuestOffset at, Buffers to) const {
        const std::size_t there =
            TRY(encryption_ ? encryption_->read(*file_, host, at.value, to) : file_->read(host, to));
        if (there == to.size()) return {};
        const std::uint64_t file_size = TRY(file_->size());
        const auto file_clusters = divide_up(file_size, header_.cluster_size());
        if (divide_up(host.value + to.size(), header_.cluster_size()) <= file_clusters) return {};
        const std::uint64_t file_end = file_clusters * header_.cluster_size();
        const std::uint64_t in_file = file_end - std::min(host.value, file_end);
        return unreadable({Errc::corrupt, file_->name(),
                           fmt::format("the data of guest offset {:#x} would lie at host offset {:#x}, past the end of "
                                       "the file ({} bytes): the file was cut",
                                       at.value + there, host.value + there, file_size)},
                          at + in_file, to.size() - in_file);
    }

    format::Qcow1Header header_;
    std::string backing_name_;
    std::shared_ptr<Storage> file_;
    BackingFile backing_;
    mutable WordCache words_;
    std::unique_ptr<EncryptedBytes> encryption_;  // null: not encrypted, or the key is not known
};

class PendingQcow1 final : public PendingImage {
public:
    PendingQcow1(std::shared_ptr<Storage> storage, format::Qcow1Header header, std::string backing_name)
        : storage_(std::move(storage)), header_(header), backing_name_(std::move(backing_name)) {}

    [[nodiscard]] std::optional<Backing> backing() const override {
        if (backing_name_.empty()) return std::nullopt;
        return Backing{backing_name_, std::nullopt};
    }

    [[nodiscard]] std::optional<std::string> encryption() const override {
        return header_.encrypted ? std::optional<std::string>("aes") : std::nullopt;
    }

    Result<std::shared_ptr<Layer>> open(Neighbours neighbours) override {
        if (neighbours.write)
            return fail(Errc::unsupported, "", "images of version 1 cannot be written; convert it to qcow2");
        std::shared_ptr<const crypto::SectorCipher> cipher;
        if (neighbours.key) cipher = TRY(luks::legacy_cipher(*neighbours.key));
        return std::make_shared<Qcow1Image>(header_, backing_name_, storage_, std::move(neighbours.backing),
                                            neighbours.alone, neighbours.cache_bytes, std::move(cipher));
    }

private:
    std::shared_ptr<Storage> storage_;
    format::Qcow1Header header_;
    std::string backing_name_;
};

}  // namespace

Result<std::unique_ptr<PendingImage>> begin(std::shared_ptr<Storage> storage) {
    std::array<std::byte, format::qcow1_header_bytes> start = {};
    const auto there = TRY(storage->read({0}, start));
    const auto header = TRY(format::parse_qcow1_header(std::span(start).first(there), TRY(storage->size())));
    std::string backing_name;
    if (header.backing_name_offset != 0) {
        backing_name.resize(header.backing_name_length);
        TRY(storage->read({header.backing_name_offset}, std::as_writable_bytes(std::span(backing_name))));
    }
    return std::make_unique<PendingQcow1>(std::move(storage), header, std::move(backing_name));
}

}  // namespace qcow::qcow1
