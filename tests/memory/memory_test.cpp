// Memory runs out in the engine, at every single place where it takes some: the request says so, and what is in the
// file is as good as after a power loss.

#include <gtest/gtest.h>

#include "engine/faulty_run.h"
#include "engine/image_kinds.h"
#include "memory/shortage.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

/// What lies below the engine has memory.
class FedStorage final : public PassThrough {
    template <class F>
    static auto fed(const F& work) {
        const Works something_else(false);
        return work();
    }

public:
    using PassThrough::PassThrough;

    [[nodiscard]] Result<std::uint64_t> size() const override {
        return fed([&] { return inner().size(); });
    }
    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        return fed([&] { return inner().read(at, to); });
    }
    Result<void> write(HostOffset at, ConstBuffers from) override {
        return fed([&] { return inner().write(at, from); });
    }
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        return fed([&] { return inner().write_zeroes(at, length); });
    }
    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        return fed([&] { return inner().allocate(at, length); });
    }
    Result<void> resize(std::uint64_t size) override {
        return fed([&] { return inner().resize(size); });
    }
    Result<void> flush() override {
        return fed([&] { return inner().flush(); });
    }
};

/// An image of which each call is the engine's work.
class HungryImage final : public Image {
    template <class F>
    static auto hungry(const F& work) {
        const Works engine(true);
        return work();
    }

public:
    explicit HungryImage(std::shared_ptr<Image> inner) : inner_(std::move(inner)) {}
    ~HungryImage() override {
        const Works engine(true);
        inner_.reset();
    }

    [[nodiscard]] std::uint64_t size() const override { return inner_->size(); }
    [[nodiscard]] Format format() const override { return inner_->format(); }
    [[nodiscard]] std::uint64_t block_size() const override { return inner_->block_size(); }
    [[nodiscard]] std::vector<std::string> files() const override { return inner_->files(); }
    [[nodiscard]] Result<ImageInfo> do_info() const override {
        return hungry([&] { return inner_->info(); });
    }
    Result<void> do_read(GuestOffset at, Buffers to) override {
        return hungry([&] { return inner_->read(at, to); });
    }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        return hungry([&] { return inner_->extent(at, limit); });
    }
    Result<void> do_write(GuestOffset at, ConstBuffers from) override {
        return hungry([&] { return inner_->write(at, from); });
    }
    Result<void> do_write_compressed(GuestOffset at, std::span<const std::byte> from,
                                     std::optional<int> level) override {
        return hungry([&] { return inner_->write_compressed(at, from, level); });
    }
    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) override {
        return hungry([&] { return inner_->write_zeroes(at, length, zeroes); });
    }
    Result<void> do_discard(GuestOffset at, std::uint64_t length) override {
        return hungry([&] { return inner_->discard(at, length); });
    }
    Result<void> do_flush() override {
        return hungry([&] { return inner_->flush(); });
    }
    Result<void> do_resize(std::uint64_t size) override {
        return hungry([&] { return inner_->resize(size, Shrink::allow); });
    }
    Result<void> do_close() override {
        return hungry([&] { return inner_->close(); });
    }

    // Everything is passed on, so that the image inside does what an image does.
    [[nodiscard]] Result<void> verify_writable() const override { return {}; }

private:
    std::shared_ptr<Image> inner_;
};

constexpr unsigned steps = 25;

ImageKind small_kind(const std::string& name) {
    for (auto kind : image_kinds()) {
        if (kind.name != name) continue;
        kind.create.size = std::uint64_t{256} << 10;
        return kind;
    }
    throw std::runtime_error("no kind " + name);
}

class MemoryTest : public testing::TestWithParam<const char*> {
protected:
    [[nodiscard]] std::unique_ptr<FaultyRun> begin() const {
        const Opener open = [kind = kind_](const Files& files, bool writable) -> Result<std::shared_ptr<Image>> {
            if (!writable) return open_kind(kind, files, false);
            Files fed;
            for (const auto& [name, storage] : files) fed[name] = std::make_shared<FedStorage>(storage);
            auto image = [&] {
                const Works engine(true);
                return open_kind(kind, fed, true);
            }();
            if (!image) return image;
            return std::make_shared<HungryImage>(*std::move(image));
        };
        auto run =
            std::make_unique<FaultyRun>(FaultyRun::Setting{.open = open,
                                                           .files = prepared_.files,
                                                           .sectors = kind_.create.size / sector_bytes,
                                                           .sectors_most = sectors_most(),
                                                           .discards_read_as_zeros = kind_.discards_read_as_zeros(),
                                                           .kept = prepared_.kept});
        run->open();
        return run;
    }

    void work(FaultyRun& run) const {
        run.work({.write = 10,
                  .write_compressed = kind_.can_compress() ? 1U : 0U,
                  .zero = 3,
                  .discard = 4,
                  .flush = 4,
                  .resize = 1,
                  .read = 2,
                  .longest = 60,
                  .resized_most = sectors_most()},
                 steps);
        run.close();
    }

    [[nodiscard]] std::uint64_t sectors_most() const { return kind_.create.size / sector_bytes * 4; }

    ImageKind kind_ = small_kind(GetParam());
    Random random_ = Random::named(kind_.name);
    Prepared prepared_ = prepare(kind_, random_);
};

TEST_P(MemoryTest, RunsOutAndNothingIsLost) {
    SCOPED_TRACE(replay_hint());
    std::uint64_t allocations = 0;
    // Twice: what is only taken once a thread is not what is looked for.
    for (int i = 0; i < 2; ++i) {
        const auto dry = begin();
        shortage = {};
        work(*dry);
        allocations = shortage.count;
        ASSERT_TRUE(dry->errors().empty());
    }
    ASSERT_GT(allocations, steps);
    const auto wanted = std::min<std::uint64_t>(allocations, rounds(150));
    for (std::uint64_t i = 0; i < wanted; ++i) {
        const auto run = begin();
        const auto after = wanted == allocations ? i : random_.below(allocations);
        shortage = {.after = after, .times = random_.pick({std::uint64_t{1}, std::uint64_t{3}, ~std::uint64_t{0} / 2})};
        SCOPED_TRACE(testing::Message() << "allocation " << after << " of " << allocations << " fails, "
                                        << shortage.times << " times");
        ASSERT_NO_THROW(work(*run));
        const auto hits = std::exchange(shortage, {}).hits;
        ASSERT_NE(hits, 0U);
        for (const auto& error : run->errors()) ASSERT_EQ(error.code, Errc::no_memory) << error.message();
        const auto wrong = run->verdict(random_);
        ASSERT_FALSE(wrong) << *wrong;
    }
    std::cout << "covered " << wanted << " failed allocations of memory\n";
}

TEST_P(MemoryTest, RunsOutWhileAnImageIsOpened) {
    auto options = kind_.open;
    options.writable = true;
    options.gate = gate_to(prepared_.files);
    const auto open = [&](Shortage given) {
        auto file = prepared_.files.at(image_name);
        shortage = given;
        const Works engine(true);
        return open_image(std::move(file), options);
    };
    ASSERT_TRUE(open({}));
    const auto allocations = std::exchange(shortage, {}).count;
    unsigned failures = 0;
    for (std::uint64_t i = 0; i < allocations; ++i) {
        const auto opened = open({.after = i});
        shortage = {};
        if (opened) continue;
        ASSERT_EQ(opened.error().code, Errc::no_memory) << opened.error().message();
        ++failures;
    }
    EXPECT_GT(failures, allocations / 2);
}

TEST_P(MemoryTest, RunsOutWhileAnImageIsChecked) {
    const auto image = value_of(open_kind(kind_, prepared_.files, false));
    expect_no_memory([&] { return image->check({.workers = 1}); });
}

TEST_P(MemoryTest, RunsOutWhileADiskIsCopied) {
    const auto image = value_of(open_kind(kind_, prepared_.files, false));
    const auto target =
        value_of(open_image(memory_storage(Bytes(image->size())), {.writable = true, .format = Format::raw}));
    expect_no_memory([&] { return copy_disk(*image, *target, {.workers = 1}); });
}

TEST(NewImageMemoryTest, RunsOutWhileAnImageIsMade) {
    const auto file = memory_storage({}, image_name);
    CreateOptions options;
    options.size = std::uint64_t{1} << 20;
    expect_no_memory([&]() -> Result<void> {
        {
            const Works test(false);
            value_of(file->resize(0));
        }
        return create_image({file, nullptr}, options);
    });
}

INSTANTIATE_TEST_SUITE_P(Kinds, MemoryTest,
                         testing::Values("v3_512", "v3_4k", "v2_4k", "extended_16k", "over_qcow2_longer_v3",
                                         "compressed_4k", "snapshot_4k", "data_file", "refcounts_1"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace qcow::test
