#include "fuzz/metadata_walk.h"

#include <algorithm>

#include "base/bits.h"
#include "base/endian.h"

namespace qcow::fuzz {
namespace {

constexpr std::uint64_t address_mask = 0x00ff'ffff'ffff'fe00;
constexpr std::uint64_t max_table_bytes = 256 * KiB;  // that are looked at
constexpr std::uint32_t bitmaps_extension = 0x2385'2875;

class Walk {
public:
    explicit Walk(const Storage& file) : file_(file) {}

    Metadata run() {
        const auto header = bytes_at(0, 512);
        const auto word = [&](std::size_t at) { return load_be<std::uint64_t>(header, at); };
        const auto half = [&](std::size_t at) { return load_be<std::uint32_t>(header, at); };
        const auto version = half(4);
        if (half(0) != 0x5146'49fb || version < 2 || version > 3 || half(20) < 9 || half(20) > 21) return {};
        result_.cluster_bits = half(20);
        add(0, 1, "the header");

        const std::uint64_t table_bytes = std::uint64_t{half(56)} << result_.cluster_bits;
        add(word(48), table_bytes, "the refcount table");
        each_word(word(48), table_bytes,
                  [&](std::uint64_t entry) { add(entry & ~low_bits(9), 1, "a refcount block"); });
        add_l1(word(40), half(36), true);
        walk_snapshots(word(64), half(60));
        if (version == 3 && (word(88) & 1) != 0) walk_bitmaps(half(100));
        return std::move(result_);
    }

private:
    std::vector<std::byte> bytes_at(std::uint64_t at, std::uint64_t length) const {
        std::vector<std::byte> bytes(length);
        if (at < bit(62)) static_cast<void>(file_.read({at}, bytes));
        return bytes;
    }

    template <class Visit>
    void each_word(std::uint64_t at, std::uint64_t length, Visit&& visit) const {
        const auto bytes = bytes_at(at, std::min(length, max_table_bytes));
        for (std::size_t i = 0; i + 8 <= bytes.size(); i += 8) {
            if (const auto word = load_be<std::uint64_t>(bytes, i); word != 0) visit(word);
        }
    }

    void add(std::uint64_t at, std::uint64_t length, std::string_view what) {
        if (length == 0 || at >= bit(62)) return;
        const std::uint64_t first = at >> result_.cluster_bits;
        const std::uint64_t last = (at + std::min(length, max_table_bytes) - 1) >> result_.cluster_bits;
        for (std::uint64_t cluster = first; cluster <= last; ++cluster) result_.clusters.emplace(cluster, what);
    }

    void add_l1(std::uint64_t at, std::uint64_t entries, bool active) {
        add(at, entries * 8, active ? "the L1 table" : "the L1 table of a snapshot");
        if (!active) return;
        each_word(at, entries * 8, [&](std::uint64_t entry) {
            if ((entry & address_mask) != 0) add(entry & address_mask, 1, "an L2 table");
        });
    }

    void walk_snapshots(std::uint64_t at, std::uint32_t count) {
        const auto keep = [&](const std::vector<std::byte>& bytes) {
            result_.snapshots.insert(result_.snapshots.end(), bytes.begin(), bytes.end());
        };
        for (std::uint32_t i = 0; i < std::min(count, 64U); ++i) {
            const auto fixed = bytes_at(at, 40);
            const auto length = divide_up(40 + std::uint64_t{load_be<std::uint16_t>(fixed, 12)} +
                                              load_be<std::uint16_t>(fixed, 14) + load_be<std::uint32_t>(fixed, 36),
                                          8) *
                                8;
            add(at, length, "the snapshot table");
            keep(bytes_at(at, std::min(length, max_table_bytes)));
            const auto l1 = load_be<std::uint64_t>(fixed, 0);
            const auto entries = load_be<std::uint32_t>(fixed, 8);
            add_l1(l1, entries, false);
            keep(bytes_at(l1, std::min<std::uint64_t>(std::uint64_t{entries} * 8, 4 * KiB)));
            at += length;
        }
    }

    void walk_bitmaps(std::uint64_t extensions) {
        const auto cluster = bytes_at(0, bit(result_.cluster_bits));
        for (std::uint64_t at = extensions; at <= cluster.size() - 8;) {
            const auto type = load_be<std::uint32_t>(cluster, at);
            const std::uint64_t length = load_be<std::uint32_t>(cluster, at + 4);
            if (type == 0 || length > cluster.size() - at - 8) return;
            if (type == bitmaps_extension && length >= 24) {
                return walk_directory(load_be<std::uint64_t>(cluster, at + 24),
                                      load_be<std::uint64_t>(cluster, at + 16),
                                      load_be<std::uint32_t>(cluster, at + 8));
            }
            at += 8 + divide_up(length, 8) * 8;
        }
    }

    void walk_directory(std::uint64_t at, std::uint64_t length, std::uint32_t count) {
        add(at, length, "the bitmap directory");
        for (std::uint32_t i = 0; i < std::min(count, 64U); ++i) {
            const auto entry = bytes_at(at, 24);
            const std::uint64_t table_bytes = std::uint64_t{load_be<std::uint32_t>(entry, 8)} * 8;
            add(load_be<std::uint64_t>(entry, 0), table_bytes, "a bitmap's table");
            each_word(load_be<std::uint64_t>(entry, 0), table_bytes, [&](std::uint64_t word) {
                if ((word & address_mask) != 0) add(word & address_mask, 1, "a bitmap");
            });
            at += divide_up(24 + std::uint64_t{load_be<std::uint32_t>(entry, 20)} + load_be<std::uint16_t>(entry, 18),
                            8) *
                  8;
        }
    }

    const Storage& file_;
    Metadata result_;
};

}  // namespace

Metadata metadata_of(const Storage& file) { return Walk(file).run(); }

}  // namespace qcow::fuzz
