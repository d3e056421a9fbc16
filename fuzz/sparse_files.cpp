#include "fuzz/sparse_files.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow::fuzz {
namespace {

constexpr std::size_t max_files = 4;
constexpr std::size_t max_segments = 512;
constexpr std::size_t max_expanded_bytes = 512 * KiB;
constexpr std::uint64_t max_size = bit(62);
constexpr std::uint64_t max_in_memory = 256 * KiB;

enum Record : std::uint8_t { data = 0, size = 1, next_file = 2, repeated = 3 };

/// Takes numbers and bytes off the front of an input; what is missing at its end reads as zeros.
class Reader {
public:
    explicit Reader(std::span<const std::byte> in) : in_(in) {}

    [[nodiscard]] bool empty() const { return in_.empty(); }

    std::uint64_t number(std::size_t bytes) {
        std::uint64_t value = 0;
        for (const std::byte b : take(bytes)) value = value << 8 | static_cast<std::uint8_t>(b);
        return value;
    }

    std::span<const std::byte> take(std::size_t bytes) {
        const auto front = in_.first(std::min(bytes, in_.size()));
        in_ = in_.subspan(front.size());
        return front;
    }

private:
    std::span<const std::byte> in_;
};

class SparseStorage final : public Storage {
public:
    SparseStorage(SparseFile file, std::string name)
        : file_(std::move(file)), size_(file_.size()), name_(std::move(name)) {}

    [[nodiscard]] const std::string& name() const override { return name_; }
    [[nodiscard]] std::string identity() const override {
        return fmt::format("sparse:{}", static_cast<const void*>(this));
    }
    [[nodiscard]] Result<std::uint64_t> size() const override { return size_; }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return 0; }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        for (std::uint64_t begin = at.value; const auto piece : to) {
            file_.read(begin, piece);
            begin += piece.size();
        }
        return at.value >= size_ ? 0 : std::min<std::uint64_t>(to.size(), size_ - at.value);
    }

    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        if (at.value >= size_) return Run{false, limit};
        std::uint64_t end = std::min(size_ - at.value, limit);
        for (const auto& segment : file_.segments) {
            if (at.value >= segment.offset && at.value - segment.offset < segment.bytes.size())
                return Run{true, std::min(end, segment.offset + segment.bytes.size() - at.value)};
            if (segment.offset > at.value && !segment.bytes.empty()) end = std::min(end, segment.offset - at.value);
        }
        return Run{false, end};
    }

    Result<void> write(HostOffset, ConstBuffers) override { return read_only(); }
    Result<void> write_zeroes(HostOffset, std::uint64_t) override { return read_only(); }
    Result<void> resize(std::uint64_t) override { return read_only(); }
    Result<void> flush() override { return {}; }

private:
    std::unexpected<Error> read_only() const { return fail(Errc::read_only, name_, "not writable"); }

    SparseFile file_;
    std::uint64_t size_;
    std::string name_;
};

}  // namespace

std::uint64_t SparseFile::size() const {
    if (fixed_size) return *fixed_size;
    std::uint64_t end = 0;
    for (const auto& segment : segments) end = std::max(end, segment.offset + segment.bytes.size());
    return end;
}

void SparseFile::read(std::uint64_t at, std::span<std::byte> to) const {
    if (to.empty()) return;
    std::memset(to.data(), 0, to.size());
    const std::uint64_t end = std::min(at + to.size(), size());
    for (const auto& segment : segments) {
        const std::uint64_t first = std::max(at, segment.offset);
        const std::uint64_t last = std::min(end, segment.offset + segment.bytes.size());
        if (first < last)
            std::memcpy(to.data() + (first - at), segment.bytes.data() + (first - segment.offset), last - first);
    }
}

std::uint64_t SparseFile::word(std::uint64_t at) const {
    std::array<std::byte, 8> bytes = {};
    read(at, bytes);
    return load_be<std::uint64_t>(bytes, 0);
}

std::uint32_t SparseFile::half_word(std::uint64_t at) const { return static_cast<std::uint32_t>(word(at) >> 32); }

void SparseFile::write(std::uint64_t at, std::span<const std::byte> bytes) {
    if (bytes.empty()) return;
    for (auto& segment : segments) {
        if (at >= segment.offset && lies_within(at - segment.offset, bytes.size(), segment.bytes.size())) {
            std::ranges::copy(bytes, segment.bytes.begin() + static_cast<std::ptrdiff_t>(at - segment.offset));
            return;
        }
        // What follows directly makes the segment longer.
        if (at == segment.offset + segment.bytes.size() && segment.bytes.size() + bytes.size() <= 4096) {
            segment.bytes.insert(segment.bytes.end(), bytes.begin(), bytes.end());
            return;
        }
    }
    segments.push_back({at, {bytes.begin(), bytes.end()}});
}

void SparseFile::write_word(std::uint64_t at, std::uint64_t value) {
    std::array<std::byte, 8> bytes = {};
    store_be(bytes, 0, value);
    write(at, bytes);
}

void SparseFile::write_half_word(std::uint64_t at, std::uint32_t value) {
    std::array<std::byte, 4> bytes = {};
    store_be(bytes, 0, value);
    write(at, bytes);
}

std::vector<SparseFile> parse_files(std::span<const std::byte> input) {
    std::vector<SparseFile> files(1);
    std::size_t segments = 0;
    std::size_t expanded = 0;
    for (Reader in(input); !in.empty();) {
        const auto kind = static_cast<Record>(in.number(1) & 3);
        if (kind == Record::next_file) {
            if (files.size() == max_files) break;
            files.emplace_back();
            continue;
        }
        if (kind == Record::size) {
            files.back().fixed_size = std::min(in.number(8), max_size);
            continue;
        }
        const auto offset = in.number(8) % max_size;
        const auto length = static_cast<std::size_t>(in.number(2));
        const auto count = kind == Record::repeated ? static_cast<std::size_t>(in.number(2)) : 1;
        const auto bytes = in.take(length);
        if (++segments > max_segments || bytes.size() * count > max_expanded_bytes - expanded) break;
        expanded += bytes.size() * count;
        SparseFile::Segment segment{offset, {}};
        segment.bytes.reserve(bytes.size() * count);
        for (std::size_t i = 0; i < count; ++i) segment.bytes.insert(segment.bytes.end(), bytes.begin(), bytes.end());
        files.back().segments.push_back(std::move(segment));
    }
    return files;
}

std::vector<std::byte> encode_files(std::span<const SparseFile> files) {
    std::vector<std::byte> out;
    const auto number = [&](std::uint64_t value, unsigned bytes) {
        for (unsigned i = bytes; i > 0; --i) out.push_back(static_cast<std::byte>(value >> (8 * (i - 1))));
    };
    for (std::size_t i = 0; i < files.size(); ++i) {
        if (i != 0) number(Record::next_file, 1);
        if (files[i].fixed_size) {
            number(Record::size, 1);
            number(*files[i].fixed_size, 8);
        }
        for (const auto& segment : files[i].segments) {
            for (std::size_t done = 0; done < segment.bytes.size();) {
                const auto piece =
                    std::span(segment.bytes).subspan(done, std::min<std::size_t>(segment.bytes.size() - done, 0xffff));
                // Runs of one word, as tables and fill patterns have them, shrink to that word.
                const bool repeats = piece.size() > 32 && piece.size() % 8 == 0 &&
                                     std::equal(piece.begin() + 8, piece.end(), piece.begin());
                number(repeats ? Record::repeated : Record::data, 1);
                number(segment.offset + done, 8);
                number(repeats ? 8 : piece.size(), 2);
                if (repeats) number(piece.size() / 8, 2);
                const auto payload = repeats ? piece.first(8) : piece;
                out.insert(out.end(), payload.begin(), payload.end());
                done += piece.size();
            }
        }
    }
    return out;
}

std::shared_ptr<Storage> storage_of(SparseFile file, std::string name) {
    const std::uint64_t size = file.size();
    if (size > max_in_memory) return std::make_shared<SparseStorage>(std::move(file), std::move(name));
    std::vector<std::byte> bytes(size);
    file.read(0, bytes);
    return memory_storage(std::move(bytes), std::move(name));
}

}  // namespace qcow::fuzz
