#include "fuzz/image_builder.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <string_view>

#include "base/bits.h"
#include "base/endian.h"
#include "format/entries.h"
#include "format/header.h"
#include "format/luks.h"

namespace qcow::fuzz {
namespace {

using Bytes = std::vector<std::byte>;

Bytes pattern(Random& random, std::size_t size) {
    Bytes bytes(size);
    const auto seed = random.word();
    // One word again and again, or sixteen of them: small as an input, and compressible.
    const unsigned period = random.chance(80) ? 1 : 16;
    for (std::size_t at = 0; at + 8 <= size; at += 8) store_be<std::uint64_t>(bytes, at, seed + at / 8 % period);
    return bytes;
}

Bytes compress(const Bytes& plain, bool zstd, bool endless) {
    Bytes out(plain.size() + 1024);
    if (zstd) {
        const auto size = ZSTD_compress(out.data(), out.size(), plain.data(), plain.size(), 1);
        out.resize(ZSTD_isError(size) != 0 ? 0 : size);
        return out;
    }
    z_stream stream = {};
    if (deflateInit2(&stream, 1, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK) return {};
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(plain.data()));
    stream.avail_in = static_cast<uInt>(plain.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    deflate(&stream, endless ? Z_SYNC_FLUSH : Z_FINISH);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

void append(Bytes& out, std::string_view text) {
    for (const char c : text) out.push_back(static_cast<std::byte>(c));
}
void append(Bytes& out, std::uint64_t value, unsigned bytes) {
    for (unsigned i = bytes; i > 0; --i) out.push_back(static_cast<std::byte>(value >> (8 * (i - 1))));
}
void pad(Bytes& out) { out.resize((out.size() + 7) / 8 * 8); }

constexpr std::array names = {"base.qcow2",
                              "../x.raw",
                              "/etc/shadow",
                              "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"b\"}}",
                              "nbd:localhost:10809",
                              "file:b",
                              "",
                              "a\nb"};
constexpr std::array format_names = {"raw", "qcow2", "qcow", "file", "vmdk", ""};

class Qcow2Builder {
public:
    explicit Qcow2Builder(Random& random) : random_(random) {
        extended_l2_ = random_.chance(15);
        constexpr std::array common_bits = {9U, 9U, 9U, 9U, 9U, 9U, 9U, 10U, 10U, 12U, 16U, 16U, 21U};
        cluster_bits_ = extended_l2_ ? 14 + static_cast<unsigned>(random_.below(3))
                                     : common_bits[random_.below(common_bits.size())];
        version_ = extended_l2_ || random_.chance(75) ? 3 : 2;
        zstd_ = version_ == 3 && random_.chance(30);
        external_ = version_ == 3 && random_.chance(8);
        refcount_order_ = version_ == 3 ? static_cast<unsigned>(random_.below(7)) : 4;
        const auto clusters = 1 + random_.below(random_.chance(80) ? 24 : 200);
        size_ = clusters * cluster_size() - (random_.chance(30) ? random_.below(cluster_size()) : 0);
        if (random_.chance(5)) size_ += std::uint64_t{1} << (20 + random_.below(12));
    }

    std::vector<SparseFile> build() {
        allocate(1);  // the header
        active_ = make_l1();
        if (!external_) make_snapshots();
        if (version_ == 3 && random_.chance(25)) make_bitmaps();
        if (random_.chance(5)) make_encryption();
        write_mapping();
        write_refcounts();
        write_header();
        if (random_.chance(20)) file_.fixed_size = next_ * cluster_size();
        std::vector<SparseFile> files{std::move(file_)};
        for (unsigned i = 0; i < other_files_; ++i) {
            if (other_files_ == 1 && !external_ && random_.chance(60)) {
                auto below = Qcow2Builder(random_).build();
                files.insert(files.end(), below.begin(), below.begin() + 1);
            } else {
                SparseFile raw;
                raw.write(random_.below(4) * 512, pattern(random_, 512 * (1 + random_.below(8))));
                // A data file is as long as the disk.
                raw.fixed_size = random_.below(2) == 0 && !external_ ? raw.size() : size_ + random_.below(1024);
                files.push_back(std::move(raw));
            }
        }
        return files;
    }

private:
    struct L2Table {
        std::uint64_t host = 0;
        std::vector<std::uint64_t> words;
    };
    struct L1Table {
        std::uint64_t host = 0;
        std::vector<std::size_t> tables;  // indices into l2_tables_, none: unallocated
    };
    static constexpr std::size_t none = ~std::size_t{0};

    [[nodiscard]] std::uint64_t cluster_size() const { return bit(cluster_bits_); }
    [[nodiscard]] std::uint64_t l2_entries() const { return cluster_size() / (extended_l2_ ? 16 : 8); }
    [[nodiscard]] std::uint64_t l1_entries() const { return divide_up(size_, cluster_size() * l2_entries()); }

    std::uint64_t allocate(std::uint64_t clusters) {
        const auto at = next_ * cluster_size();
        for (std::uint64_t i = 0; i < clusters; ++i) ++refcounts_[next_ + i];
        next_ += clusters;
        return at;
    }

    std::uint64_t data_cluster() {
        const auto host = allocate(1);
        file_.write(host, pattern(random_, std::min<std::uint64_t>(cluster_size(), 512 << random_.below(3))));
        return host;
    }

    /// The entry of a compressed cluster, 0 where it would not become smaller.
    std::uint64_t compressed_entry() {
        if (cluster_size() > 64 * KiB && !random_.chance(5)) return 0;
        const auto stream = compress(pattern(random_, cluster_size()), zstd_, random_.chance(10));
        if (stream.empty() || stream.size() >= cluster_size()) return 0;
        // The first of a cluster takes the reference that allocate gives; whether it stays is known when mapping is
        // written.
        if (stream_at_ % cluster_size() == 0 || stream_at_ % cluster_size() + stream.size() > cluster_size()) {
            stream_at_ = allocate(1);
            refcounts_[stream_at_ >> cluster_bits_] = 0;
        }
        const auto at = stream_at_;
        file_.write(at, stream);
        stream_at_ += stream.size();
        const auto more_sectors = (at + stream.size() - 1) / 512 - at / 512;
        return format::compressed_bit | more_sectors << (62 - (cluster_bits_ - 8)) | at;
    }

    void set_entry(L2Table& table, std::uint64_t index, std::uint64_t guest) {
        auto* word = &table.words[index * (extended_l2_ ? 2 : 1)];
        const auto dice = random_.below(100);
        if (external_) {
            if (dice < 60) {
                word[0] = guest | format::copied_bit;
                if (extended_l2_) word[1] = 0xffff'ffff;
            }
            return;
        }
        if (dice < 25) {
            if (const auto entry = compressed_entry(); entry != 0) word[0] = entry;
        } else if (dice < 60) {
            word[0] = data_cluster();
            if (extended_l2_) {
                const auto allocated = random_.chance(50) ? 0xffff'ffff : static_cast<std::uint32_t>(random_.word());
                word[1] = allocated | (~std::uint64_t{allocated} & random_.word()) << 32;
            }
        } else if (dice < 75 && version_ == 3) {
            if (extended_l2_) {
                word[1] = (random_.word() | 1) << 32;
            } else {
                word[0] = (random_.chance(30) ? data_cluster() : 0) | format::zero_bit;
            }
        }
    }

    L1Table make_l1() {
        L1Table l1;
        l1.tables.assign(l1_entries(), none);
        const auto clusters = divide_up(size_, cluster_size());
        for (std::size_t i = 0; i < std::min<std::size_t>(l1.tables.size(), 8); ++i) {
            if (random_.chance(15)) continue;
            l1.tables[i] = l2_tables_.size();
            L2Table table{allocate(1), std::vector<std::uint64_t>(cluster_size() / 8)};
            const auto used =
                std::min<std::uint64_t>({l2_entries(), clusters - i * l2_entries(), cluster_bits_ > 12 ? 6U : 40U});
            for (std::uint64_t index = 0; index < used; ++index)
                set_entry(table, index, (i * l2_entries() + index) * cluster_size());
            l2_tables_.push_back(std::move(table));
        }
        l1.host = allocate(std::max<std::uint64_t>(1, divide_up(l1.tables.size() * 8, cluster_size())));
        return l1;
    }

    void make_snapshots() {
        if (!random_.chance(35)) return;
        Bytes table;
        const auto count = 1 + random_.below(3);
        for (std::uint64_t i = 0; i < count; ++i) {
            L1Table l1 = active_;
            if (random_.chance(30)) {
                l1 = make_l1();
            } else {
                l1.host = allocate(std::max<std::uint64_t>(1, divide_up(l1.tables.size() * 8, cluster_size())));
            }
            const auto id = std::to_string(i + 1);
            const std::string name = random_.chance(80) ? "snap" + id : "s\x1b[31m\n";
            const unsigned extra = version_ == 3 ? 16 + 8 * static_cast<unsigned>(random_.below(2))
                                                 : static_cast<unsigned>(random_.below(3)) * 8;
            append(table, l1.host, 8);
            append(table, l1.tables.size(), 4);
            append(table, id.size(), 2);
            append(table, name.size(), 2);
            append(table, 1700000000, 4);
            append(table, random_.below(1'000'000'000), 4);
            append(table, random_.word() >> 16, 8);
            append(table, 0, 4);
            append(table, extra, 4);
            if (extra >= 8) append(table, 0, 8);
            if (extra >= 16) append(table, size_, 8);
            if (extra >= 24) append(table, random_.chance(50) ? ~std::uint64_t{0} : 5, 8);
            append(table, id);
            append(table, name);
            pad(table);
            snapshots_.push_back(std::move(l1));
        }
        snapshot_table_ = allocate(divide_up(table.size(), cluster_size()));
        file_.write(snapshot_table_, table);
    }

    void make_bitmaps() {
        const auto count = 1 + random_.below(2);
        Bytes directory;
        for (std::uint64_t i = 0; i < count; ++i) {
            const unsigned granularity = 9 + static_cast<unsigned>(random_.below(8));
            const auto entries =
                std::max<std::uint64_t>(1, divide_up(divide_up(size_, bit(granularity)), cluster_size() * 8));
            if (entries > 64) continue;
            const auto at = allocate(divide_up(entries * 8, cluster_size()));
            for (std::uint64_t e = 0; e < entries; ++e)
                file_.write_word(at + e * 8, random_.chance(50) ? data_cluster() : random_.below(2));
            const auto name = "bitmap" + std::to_string(i);
            append(directory, at, 8);
            append(directory, entries, 4);
            append(directory, random_.below(4), 4);
            append(directory, 1, 1);
            append(directory, granularity, 1);
            append(directory, name.size(), 2);
            append(directory, 0, 4);
            append(directory, name);
            pad(directory);
            ++bitmaps_;
        }
        if (bitmaps_ == 0) return;
        bitmap_directory_bytes_ = directory.size();
        bitmap_directory_ = allocate(divide_up(directory.size(), cluster_size()));
        file_.write(bitmap_directory_, directory);
    }

    /// A sound header, to which no passphrase is known.
    void make_encryption() {
        format::Luks1Header luks;
        luks.cipher = "aes";
        luks.mode = "xts-plain64";
        luks.hash = "sha256";
        luks.key_bytes = 32;
        luks.iterations = 1000;
        luks.slots[0].used = true;
        luks.slots[0].iterations = 1000;
        std::uint32_t sector = 8;
        for (auto& slot : luks.slots) {
            slot.material_sector = sector;
            sector += static_cast<std::uint32_t>(divide_up(luks.material_bytes(), format::luks_sector_bytes));
        }
        luks.payload_sector = sector;
        encryption_bytes_ = std::uint64_t{sector} * format::luks_sector_bytes;
        encryption_ = allocate(divide_up(encryption_bytes_, cluster_size()));
        file_.write(encryption_, format::encode_luks1_header(luks));
        file_.write(encryption_ + encryption_bytes_ - 1, Bytes(1));
    }

    /// Now that all tables are known: who refers to what how often, and which entries are COPIED.
    void write_mapping() {
        std::vector<std::uint64_t> uses(l2_tables_.size());
        const auto count = [&](const L1Table& l1) {
            for (const auto index : l1.tables)
                if (index != none) ++uses[index];
        };
        count(active_);
        for (const auto& snapshot : snapshots_) count(snapshot);
        const unsigned step = extended_l2_ ? 2 : 1;
        for (std::size_t i = 0; i < l2_tables_.size(); ++i) {
            auto& table = l2_tables_[i];
            refcounts_[table.host >> cluster_bits_] = uses[i];
            for (std::size_t w = 0; w < table.words.size(); w += step) {
                const auto word = table.words[w];
                if (external_ || word == 0) continue;
                if ((word & format::compressed_bit) != 0) {
                    const auto range = format::L2Entry{word}.compressed_range(cluster_bits_);
                    const auto last = (range.offset.value + range.length - 1) >> cluster_bits_;
                    for (auto c = range.offset.value >> cluster_bits_; c <= last; ++c) refcounts_[c] += uses[i];
                } else if ((word & format::offset_mask) != 0) {
                    refcounts_[(word & format::offset_mask) >> cluster_bits_] = uses[i];
                }
            }
        }
        const auto active_l2 = [&](std::size_t i) {
            return std::ranges::find(active_.tables, i) != active_.tables.end();
        };
        for (std::size_t i = 0; i < l2_tables_.size(); ++i) {
            auto& table = l2_tables_[i];
            for (std::size_t w = 0; w < table.words.size(); w += step) {
                auto& word = table.words[w];
                if (!external_ && active_l2(i) && uses[i] == 1 && (word & format::compressed_bit) == 0 &&
                    (word & format::offset_mask) != 0)
                    word |= format::copied_bit;
            }
            while (!table.words.empty() && table.words.back() == 0) table.words.pop_back();
            Bytes bytes;
            for (const auto word : table.words) append(bytes, word, 8);
            file_.write(table.host, bytes);
        }
        const auto write_l1 = [&](const L1Table& l1, bool active) {
            for (std::size_t i = 0; i < l1.tables.size(); ++i) {
                if (l1.tables[i] == none) continue;
                const bool copied = active && uses[l1.tables[i]] == 1;
                file_.write_word(l1.host + i * 8, l2_tables_[l1.tables[i]].host | (copied ? format::copied_bit : 0));
            }
        };
        write_l1(active_, true);
        for (const auto& snapshot : snapshots_) write_l1(snapshot, false);
    }

    void set_refcount(std::uint64_t block, std::uint64_t index, std::uint64_t value) {
        if (refcount_order_ == 6) return file_.write_word(block + index * 8, value);
        if (refcount_order_ >= 3) {
            Bytes bytes;
            append(bytes, value, 1U << (refcount_order_ - 3));
            return file_.write(block + (index << (refcount_order_ - 3)), bytes);
        }
        const unsigned per_byte_bits = 3 - refcount_order_;
        const auto at = block + (index >> per_byte_bits);
        const auto shift = (index & low_bits(per_byte_bits)) << refcount_order_;
        std::array<std::byte, 1> byte = {};
        file_.read(at, byte);
        byte[0] |= static_cast<std::byte>(value << shift);
        file_.write(at, byte);
    }

    void write_refcounts() {
        std::uint64_t largest = 1;
        for (const auto& [cluster, count] : refcounts_) largest = std::max(largest, count);
        while (refcount_order_ < 6 && largest > low_bits(1U << refcount_order_)) ++refcount_order_;
        const auto per_block = bit(cluster_bits_ + 3 - refcount_order_);
        // The blocks count themselves and the table.
        std::uint64_t blocks = 1;
        while (blocks * per_block < next_ + blocks + divide_up(blocks * 8, cluster_size())) ++blocks;
        refcount_table_clusters_ = divide_up(blocks * 8, cluster_size());
        refcount_table_ = allocate(refcount_table_clusters_);
        std::vector<std::uint64_t> at(blocks);
        for (std::size_t i = 0; i < blocks; ++i) {
            at[i] = allocate(1);
            file_.write_word(refcount_table_ + i * 8, at[i]);
        }
        for (const auto& [cluster, count] : refcounts_) {
            if (count != 0) set_refcount(at[cluster / per_block], cluster % per_block, count);
        }
    }

    void write_header() {
        const bool backing = !external_ && random_.chance(20);
        if (backing) other_files_ = 1;
        if (external_) other_files_ = 1;
        Bytes h;
        append(h, format::magic, 4);
        append(h, version_, 4);
        // The backing file name comes last.
        h.resize(20);
        append(h, cluster_bits_, 4);
        append(h, size_, 8);
        append(h, encryption_ != 0 ? 2 : 0, 4);
        append(h, active_.tables.size(), 4);
        append(h, active_.host, 8);
        append(h, refcount_table_, 8);
        append(h, refcount_table_clusters_, 4);
        append(h, snapshots_.size(), 4);
        append(h, snapshot_table_, 8);
        if (version_ == 3) {
            append(
                h,
                (random_.chance(10) ? 1U : 0U) | (external_ ? 4U : 0U) | (zstd_ ? 8U : 0U) | (extended_l2_ ? 16U : 0U),
                8);
            append(h, random_.below(2), 8);
            append(h, bitmaps_ != 0 ? 1 : 0, 8);
            append(h, refcount_order_, 4);
            append(h, 112, 4);
            append(h, zstd_ ? 1 : 0, 1);
            h.resize(112);
        }
        const auto extension = [&](std::uint32_t type, const Bytes& data) {
            append(h, type, 4);
            append(h, data.size(), 4);
            h.insert(h.end(), data.begin(), data.end());
            pad(h);
        };
        const auto text = [](std::string_view value) {
            Bytes bytes;
            append(bytes, value);
            return bytes;
        };
        if (backing && random_.chance(70))
            extension(0xe2792aca,
                      text(random_.chance(80) ? "qcow2" : format_names[random_.below(format_names.size())]));
        if (external_)
            extension(0x44415441, text(random_.chance(80) ? "data.raw" : names[random_.below(names.size())]));
        if (bitmaps_ != 0) {
            Bytes data;
            append(data, bitmaps_, 4);
            append(data, 0, 4);
            append(data, bitmap_directory_bytes_, 8);
            append(data, bitmap_directory_, 8);
            extension(0x23852875, data);
        }
        if (encryption_ != 0) {
            Bytes data;
            append(data, encryption_, 8);
            append(data, encryption_bytes_, 8);
            extension(0x0537be77, data);
        }
        if (random_.chance(10)) {
            Bytes data;
            append(data, 0x0005, 2);
            append(data, "some feature");
            data.resize(48);
            extension(0x6803f857, data);
        }
        if (random_.chance(5)) extension(static_cast<std::uint32_t>(random_.word()), text("unknown"));
        append(h, 0, 8);
        if (backing) {
            const std::string name = random_.chance(70) ? names[0] : names[random_.below(names.size())];
            store_be<std::uint64_t>(h, 8, h.size());
            store_be<std::uint32_t>(h, 16, static_cast<std::uint32_t>(name.size()));
            append(h, name);
        }
        file_.write(0, h);
    }

    Random& random_;
    SparseFile file_;
    unsigned version_ = 3;
    unsigned cluster_bits_ = 9;
    unsigned refcount_order_ = 4;
    bool extended_l2_ = false;
    bool zstd_ = false;
    bool external_ = false;
    std::uint64_t size_ = 0;
    std::uint64_t next_ = 0;  // host cluster
    std::uint64_t stream_at_ = 0;
    std::map<std::uint64_t, std::uint64_t> refcounts_;  // by host cluster
    std::vector<L2Table> l2_tables_;
    L1Table active_;
    std::vector<L1Table> snapshots_;
    std::uint64_t snapshot_table_ = 0;
    std::uint64_t bitmap_directory_ = 0;
    std::uint64_t bitmap_directory_bytes_ = 0;
    std::uint64_t bitmaps_ = 0;
    std::uint64_t encryption_ = 0;
    std::uint64_t encryption_bytes_ = 0;
    std::uint64_t refcount_table_ = 0;
    std::uint64_t refcount_table_clusters_ = 0;
    unsigned other_files_ = 0;
};

SparseFile build_qcow1(Random& random) {
    SparseFile file;
    const unsigned cluster_bits = 9 + static_cast<unsigned>(random.below(4));
    const unsigned l2_bits = 6 + static_cast<unsigned>(random.below(3));
    const std::uint64_t clusters = 1 + random.below(150);
    const std::uint64_t size = (clusters << cluster_bits) - random.below(2) * random.below(512);
    const std::uint64_t l1_entries = divide_up(size, bit(cluster_bits + l2_bits));
    Bytes h;
    append(h, format::magic, 4);
    append(h, 1, 4);
    h.resize(24);
    append(h, size, 8);
    append(h, cluster_bits, 1);
    append(h, l2_bits, 1);
    append(h, 0, 2);
    append(h, random.chance(5) ? 1 : 0, 4);
    append(h, 48, 8);
    if (random.chance(20)) {
        store_be<std::uint64_t>(h, 8, 48 + l1_entries * 8);
        store_be<std::uint32_t>(h, 16, 4);
    }
    std::uint64_t next = bit(cluster_bits);
    std::vector<std::uint64_t> l1(l1_entries);
    for (auto& entry : l1) {
        if (random.chance(20)) continue;
        entry = next;
        next += 8 * bit(l2_bits);
        for (std::uint64_t i = 0; i < bit(l2_bits) && i < 40; ++i) {
            const auto dice = random.below(100);
            if (dice < 30) {
                next = (next + bit(cluster_bits) - 1) & ~low_bits(cluster_bits);
                file.write(next, pattern(random, 512));
                file.write_word(entry + i * 8, next);
                next += bit(cluster_bits);
            } else if (dice < 60) {
                const auto stream = compress(pattern(random, bit(cluster_bits)), false, random.chance(10));
                file.write(next, stream);
                file.write_word(entry + i * 8, bit(63) | std::uint64_t{stream.size()} << (63 - cluster_bits) | next);
                next += stream.size();
            }
        }
    }
    for (const auto entry : l1) append(h, entry, 8);
    append(h, "base");
    file.write(0, h);
    return file;
}

/// A number that stands on the border of something in this file.
std::uint64_t telling_number(const SparseFile& file, Random& random, std::uint64_t old) {
    const std::uint64_t size = file.size();
    switch (random.below(12)) {
        case 0: return old ^ bit(static_cast<unsigned>(random.below(64)));
        case 1: return old + random.below(17) - 8;
        case 2: return random.word();
        case 3: return ~std::uint64_t{0} >> random.below(64);
        case 4: return bit(static_cast<unsigned>(random.below(64)));
        case 5: return random.below(8);
        case 6: return size - random.below(3) * 512;
        case 7: return align_down(random.below(size + 1), 512);
        case 8: return old ^ format::copied_bit;
        case 9: return old ^ format::compressed_bit;
        case 10: return 0;
        default: {
            if (file.segments.empty()) return 0;
            // Where something is, perhaps something else.
            return file.segments[random.below(file.segments.size())].offset | (random.word() & format::copied_bit);
        }
    }
}

void damage_header(SparseFile& file, Random& random) {
    struct Field {
        std::uint64_t at;
        unsigned bytes;
    };
    static constexpr std::array fields = {Field{4, 4},   Field{8, 8},   Field{16, 4},  Field{20, 4},  Field{24, 8},
                                          Field{32, 4},  Field{36, 4},  Field{40, 8},  Field{48, 8},  Field{56, 4},
                                          Field{60, 4},  Field{64, 8},  Field{72, 8},  Field{80, 8},  Field{88, 8},
                                          Field{96, 4},  Field{100, 4}, Field{104, 8}, Field{112, 4}, Field{116, 4},
                                          Field{120, 8}, Field{128, 8}, Field{136, 8}};
    const auto field = fields[random.below(fields.size())];
    if (field.bytes == 8) return file.write_word(field.at, telling_number(file, random, file.word(field.at)));
    file.write_half_word(field.at, static_cast<std::uint32_t>(telling_number(file, random, file.half_word(field.at))));
}

void damage_words(SparseFile& file, Random& random, std::uint64_t table, std::uint64_t words) {
    const auto at = table + random.below(std::min<std::uint64_t>(words, random.chance(80) ? 16 : 512)) * 8;
    if (at < bit(61)) file.write_word(at, telling_number(file, random, file.word(at)));
}

void damage_file(SparseFile& file, Random& random) {
    const auto version = file.half_word(4);
    const auto cluster_bits =
        std::clamp<std::uint32_t>(version == 1 ? file.half_word(32) >> 24 : file.half_word(20), 9, 21);
    const auto words = bit(cluster_bits) / 8;
    const auto l1 = file.word(40);
    switch (random.below(12)) {
        case 0:
        case 1: return damage_header(file, random);
        case 2: return damage_words(file, random, l1, file.half_word(36));
        case 3:
        case 4:
        case 5: {
            const auto table = file.word(l1 + random.below(2) * 8) & format::offset_mask;
            return damage_words(file, random, table, words);
        }
        case 6: return damage_words(file, random, file.word(48), 2);
        case 7: return damage_words(file, random, file.word(file.word(48)) & ~low_bits(9), words);
        case 8: return damage_words(file, random, file.word(64), 12);
        case 9: {
            // The bitmap directory, if the extension is where the builder puts it.
            for (std::uint64_t at = 112; at < 200; at += 8)
                if (file.half_word(at) == 0x23852875) return damage_words(file, random, file.word(at + 24), 6);
            return damage_header(file, random);
        }
        case 10:
            file.fixed_size =
                random.chance(80) ? random.below(file.size() + 1) : telling_number(file, random, file.size()) % bit(62);
            return;
        default: {
            if (file.segments.empty()) return;
            auto& segment = file.segments[random.below(file.segments.size())];
            if (segment.bytes.empty()) return;
            segment.bytes[random.below(segment.bytes.size())] = static_cast<std::byte>(random.word());
        }
    }
}

}  // namespace

std::vector<SparseFile> build_image(Random& random) {
    if (!random.chance(12)) return Qcow2Builder(random).build();
    std::vector<SparseFile> files{build_qcow1(random)};
    if (random.chance(50)) files.push_back(build_qcow1(random));
    return files;
}

void damage(std::vector<SparseFile>& files, Random& random) {
    if (files.empty()) return;
    damage_file(files[random.chance(85) ? 0 : random.below(files.size())], random);
}

}  // namespace qcow::fuzz
