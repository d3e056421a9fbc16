// Many threads read one disk: each gets what a single one would.

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

constexpr unsigned threads = 8;
constexpr std::uint64_t disk_bytes = std::uint64_t{6} << 20;

class ConcurrentTest : public testing::Test {
protected:
    /// Commands that write the random bytes from `first` on in `count` pieces of `piece` bytes, every other one.
    [[nodiscard]] std::vector<std::string> writes(std::uint64_t first, std::uint64_t piece, unsigned count,
                                                  const std::string& flags = "") {
        std::vector<std::string> commands;
        for (unsigned i = 0; i < count; ++i) {
            const auto source = directory_.file("piece" + std::to_string(pieces_++));
            put_file(source, random_.bytes(piece));
            commands.push_back("write -q " + flags + " -s " + source + " " + std::to_string(first + 2 * i * piece) +
                               " " + std::to_string(piece));
        }
        return commands;
    }

    void create(const std::string& name, const std::string& options, const Arguments& more = {}) {
        Arguments arguments = {"create", "-q", "-f", "qcow2", "-o", options};
        arguments.insert(arguments.end(), more.begin(), more.end());
        arguments.insert(arguments.end(), {name, std::to_string(disk_bytes)});
        must_qemu_img(arguments, directory_.path());
    }

    void io(const std::string& name, const std::vector<std::string>& commands) {
        must_qemu_io(name, "qcow2", commands, directory_.path());
    }

    /// A cache so small that the threads also push each other's pages out.
    [[nodiscard]] std::shared_ptr<Image> open_with_cache(const std::string& name, std::size_t cache_bytes) const {
        OpenOptions options;
        options.gate = local_files();
        options.cache_bytes = cache_bytes;
        return value_of(open_image(value_of(open_file(directory_.file(name))), options));
    }

    void expect_same_from_all(Disk& disk) {
        SCOPED_TRACE(replay_hint());
        std::vector<std::byte> serial(disk.size());
        value_of(disk.read({0}, serial));
        const auto extents = count_extents(disk);

        std::atomic<unsigned> ready = 0;
        std::atomic<unsigned> wrong = 0;
        std::vector<std::thread> workers;
        for (unsigned t = 0; t < threads; ++t) {
            workers.emplace_back([&, seed = random_.below(~std::uint64_t{0})] {
                Random random(seed);
                std::vector<std::byte> bytes;
                ++ready;
                while (ready < threads) std::this_thread::yield();
                for (unsigned i = 0; i < 200; ++i) {
                    const auto at = random.below(disk.size());
                    const auto length = random.between(1, std::min<std::uint64_t>(200'000, disk.size() - at));
                    bytes.assign(length, std::byte{0xa5});
                    const auto read = disk.read({at}, bytes);
                    if (!read ||
                        !std::equal(bytes.begin(), bytes.end(), serial.begin() + static_cast<std::ptrdiff_t>(at)))
                        ++wrong;
                    if (i % 50 == 0 && count_extents(disk) != extents) ++wrong;
                }
            });
        }
        for (auto& worker : workers) worker.join();
        EXPECT_EQ(wrong, 0U) << "reads that did not give what a single thread reads";
    }

    static std::uint64_t count_extents(Disk& disk) {
        std::uint64_t count = 0;
        value_of(each_extent(disk, {0}, disk.size(), [&](const Extent&) -> Result<void> {
            ++count;
            return {};
        }));
        return count;
    }

    Random random_ = Random::named("concurrent");
    TemporaryDirectory directory_;
    unsigned pieces_ = 0;
};

TEST_F(ConcurrentTest, Plain) {
    create("disk.qcow2", "cluster_size=4096");
    io("disk.qcow2", writes(0, 60'000, 40));
    for (const std::size_t cache : {std::size_t{1}, std::size_t{32} << 20})
        expect_same_from_all(*open_with_cache("disk.qcow2", cache));
}

TEST_F(ConcurrentTest, SmallClusters) {
    create("disk.qcow2", "cluster_size=512");
    io("disk.qcow2", writes(100, 30'000, 60));
    expect_same_from_all(*open_with_cache("disk.qcow2", 1));
}

TEST_F(ConcurrentTest, Compressed) {
    for (const std::string type : {"zlib", "zstd"}) {
        create("disk.qcow2", "cluster_size=16384,compression_type=" + type);
        io("disk.qcow2", writes(0, 65536, 40, "-c"));
        expect_same_from_all(*open_with_cache("disk.qcow2", 1));
    }
}

TEST_F(ConcurrentTest, ExtendedL2) {
    create("disk.qcow2", "cluster_size=65536,extended_l2=on");
    io("disk.qcow2", writes(512, 7'000, 100));
    expect_same_from_all(*open_with_cache("disk.qcow2", 1));
}

TEST_F(ConcurrentTest, BackingChain) {
    create("base.qcow2", "cluster_size=4096");
    io("base.qcow2", writes(0, 50'000, 50, ""));
    create("middle.qcow2", "cluster_size=65536", {"-b", "base.qcow2", "-F", "qcow2"});
    io("middle.qcow2", writes(131072, 65536, 20, "-c"));
    create("top.qcow2", "cluster_size=65536", {"-b", "middle.qcow2", "-F", "qcow2"});
    io("top.qcow2", writes(300'000, 40'000, 30));
    expect_same_from_all(*open_with_cache("top.qcow2", 1));
}

TEST_F(ConcurrentTest, Snapshots) {
    create("disk.qcow2", "cluster_size=4096");
    io("disk.qcow2", writes(0, 60'000, 40));
    must_qemu_img({"snapshot", "-c", "old", "disk.qcow2"}, directory_.path());
    io("disk.qcow2", writes(30'000, 60'000, 40));
    const auto image = open_with_cache("disk.qcow2", 1);
    const auto snapshot = value_of(image->snapshots().open("old"));
    // Both at once: they share a cache.
    std::thread other([&] { expect_same_from_all(*image); });
    std::vector<std::byte> bytes(snapshot->size());
    std::vector<std::byte> again(snapshot->size());
    value_of(snapshot->read({0}, bytes));
    for (int i = 0; i < 20; ++i) {
        value_of(snapshot->read({0}, again));
        EXPECT_EQ(bytes, again);
    }
    other.join();
    expect_same_from_all(*snapshot);
}

/// Four times as many L2 entries as fit in the smallest cache, each one with an offset of its own.
TEST_F(ConcurrentTest, LookupsWhileTheCacheIsReplaced) {
    SCOPED_TRACE(replay_hint());
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "cluster_size=512,preallocation=metadata", "disk.qcow2", "64M"},
                  directory_.path());
    const auto image = open_with_cache("disk.qcow2", 1);
    const auto host_of = [&](std::uint64_t cluster) -> std::uint64_t {
        const auto extent = image->extent({cluster * 512}, 512);
        return extent && extent->host ? extent->host->value : 0;
    };
    std::vector<std::uint64_t> serial(image->size() / 512);
    for (std::uint64_t i = 0; i < serial.size(); ++i) serial[i] = host_of(i);
    EXPECT_EQ(std::ranges::count(serial, 0U), 0);

    std::atomic<unsigned> wrong = 0;
    std::vector<std::thread> workers;
    for (unsigned t = 0; t < threads; ++t) {
        workers.emplace_back([&, seed = random_.below(~std::uint64_t{0})] {
            Random random(seed);
            for (unsigned i = 0; i < 60'000; ++i) {
                const auto cluster = random.below(serial.size());
                if (host_of(cluster) != serial[cluster]) ++wrong;
            }
        });
    }
    for (auto& worker : workers) worker.join();
    EXPECT_EQ(wrong, 0U);
}

/// Each thread copies the whole of one shared image.
TEST_F(ConcurrentTest, Copies) {
    create("disk.qcow2", "cluster_size=4096");
    io("disk.qcow2", writes(0, 60'000, 40));
    const auto image = open_with_cache("disk.qcow2", 1);
    std::vector<std::byte> serial(image->size());
    value_of(image->read({0}, serial));
    std::atomic<unsigned> same = 0;
    std::vector<std::thread> workers;
    for (unsigned t = 0; t < threads; ++t) {
        workers.emplace_back([&] {
            const auto memory = memory_storage();
            value_of(memory->resize(image->size()));
            OpenOptions raw;
            raw.format = Format::raw;
            raw.writable = true;
            const auto target = value_of(open_image(memory, raw));
            CopyOptions options;
            options.workers = 2;
            std::vector<std::byte> bytes(image->size());
            if (copy_disk(*image, *target, options) && target->read({0}, bytes) && bytes == serial) ++same;
        });
    }
    for (auto& worker : workers) worker.join();
    EXPECT_EQ(same, threads);
}

}  // namespace
}  // namespace qcow::test
