#include "support/disks.h"

namespace qcow::test {

Result<std::shared_ptr<Image>> try_open(const std::string& path, std::optional<Format> format) {
    auto storage = open_file(path);
    if (!storage) return std::unexpected(storage.error());
    OpenOptions options;
    options.format = format;
    options.gate = local_files();
    return open_image(*storage, options);
}

std::shared_ptr<Image> must_open(const std::string& path, std::optional<Format> format) {
    return value_of(try_open(path, format));
}

std::shared_ptr<Image> open_alone(const std::string& path) {
    OpenOptions options;
    options.follow = false;
    return value_of(open_image(value_of(open_file(path)), options));
}

std::string file_bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("cannot read " + path);
    return {std::istreambuf_iterator<char>(in), {}};
}

void put_file(const std::string& path, const std::string& bytes) {
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    out << bytes;
    if (!out.flush()) throw std::runtime_error("cannot write " + path);
}

ReferenceFile::ReferenceFile(const std::string& path, std::uint64_t limit)
    : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat status = {};
    if (fd_ < 0 || fstat(fd_, &status) != 0) throw std::runtime_error("cannot open " + path);
    size_ = std::min(static_cast<std::uint64_t>(status.st_size), limit);
}

void ReferenceFile::read(std::uint64_t at, std::span<std::byte> to) const {
    while (!to.empty()) {
        const auto n = pread(fd_, to.data(), to.size(), static_cast<off_t>(at));
        if (n <= 0) throw std::runtime_error("cannot read the reference");
        at += static_cast<std::uint64_t>(n);
        to = to.subspan(static_cast<std::size_t>(n));
    }
}

std::uint64_t ReferenceFile::next_data(std::uint64_t at) const {
    const auto found = lseek(fd_, static_cast<off_t>(at), SEEK_DATA);
    return found < 0 ? size_ : static_cast<std::uint64_t>(found);
}

std::optional<std::uint64_t> first_difference(const ReferenceFile& a, const ReferenceFile& b) {
    const std::uint64_t size = std::min(a.size(), b.size());
    std::vector<std::byte> left(std::size_t{1} << 20);
    std::vector<std::byte> right(left.size());
    for (std::uint64_t at = 0; at < size;) {
        at = std::min({a.next_data(at), b.next_data(at), size});
        const auto piece = static_cast<std::size_t>(std::min<std::uint64_t>(left.size(), size - at));
        a.read(at, std::span(left).first(piece));
        b.read(at, std::span(right).first(piece));
        const auto differ =
            std::mismatch(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(piece), right.begin());
        if (differ.first != left.begin() + static_cast<std::ptrdiff_t>(piece))
            return at + static_cast<std::uint64_t>(differ.first - left.begin());
        at += piece;
    }
    if (a.size() != b.size()) return size;
    return std::nullopt;
}

void copy_to_file(Disk& disk, const std::string& target, const CopyOptions& options) {
    std::ofstream(target).close();
    auto storage = value_of(open_file(target, {.writable = true}));
    value_of(storage->resize(disk.size()));
    auto raw = value_of(open_image(storage, {.writable = true, .format = Format::raw}));
    value_of(copy_disk(disk, *raw, options));
}

void expect_random_reads(Disk& disk, const ReferenceFile& reference, Random& random, unsigned count) {
    if (disk.size() == 0) return;
    std::vector<std::byte> ours;
    std::vector<std::byte> theirs;
    for (unsigned i = 0; i < count; ++i) {
        const auto longest = random.pick({std::uint64_t{512}, std::uint64_t{5000}, 3 * disk.block_size()});
        const auto at = random.below(disk.size());
        const auto length = random.between(1, std::min(longest, disk.size() - at));
        ours.assign(length, std::byte{0xa5});
        theirs.resize(length);
        const auto read = disk.read({at}, ours);
        ASSERT_TRUE(read) << read.error().message();
        reference.read(at, theirs);
        const auto differ = std::ranges::mismatch(ours, theirs);
        ASSERT_TRUE(differ.in1 == ours.end())
            << length << " bytes read at " << at << " differ first at " << at + (differ.in1 - ours.begin());
    }
}

}  // namespace qcow::test
