#include "qcow2/metadata/refcounts.h"

#include <gtest/gtest.h>

#include "qcow/create.h"
#include "support/recording.h"
#include "support/result.h"

namespace qcow::test {
namespace {

/// Clusters of 512 bytes with refcounts of 64 bits: a block counts 64 clusters, and a sector of the table has 64
/// blocks.
class RefcountsTest : public testing::Test {
protected:
    void SetUp() override {
        CreateOptions options;
        options.size = std::uint64_t{1} << 20;
        options.cluster_size = 512;
        options.refcount_bits = 64;
        const auto file = memory_storage();
        must(create_image({file, nullptr}, options));
        Bytes cluster(512);
        must(file->read({0}, cluster));
        const auto recorded = std::make_shared<RecordingStorage>(file, "image", log_);
        metadata_ = std::make_unique<qcow2::Metadata>(must(format::parse_header(cluster)), recorded, 1 << 20);
        must(map_.load(*metadata_));
        write_back_ = std::make_unique<qcow2::WriteBack>(*metadata_, nullptr, true);
        refcounts_ = std::make_unique<qcow2::Refcounts>(*metadata_, *write_back_, map_);
        must(refcounts_->load());
    }

    StorageLog log_;
    std::unique_ptr<qcow2::Metadata> metadata_;
    qcow2::MetadataMap map_{9};
    std::unique_ptr<qcow2::WriteBack> write_back_;
    std::unique_ptr<qcow2::Refcounts> refcounts_;
};

TEST_F(RefcountsTest, TheTableIsWrittenSectorBySectorInOrder) {
    // A power loss may leave one sector of the table as it was and the next one as it is to be. Then no block may lie
    // in a cluster that a block in the former would count.
    std::uint64_t end = must(metadata_->file().size()) / 512;
    const auto cover = [&](std::uint64_t blocks) { end += must(refcounts_->cover(end, blocks * 64)) + blocks * 64; };
    cover(300);
    cover(40);  // the table grows by half: it has room for 480 now
    const auto table = metadata_->state().refcount_table.value;
    const auto begin = log_.mark();
    cover(100);
    ASSERT_EQ(metadata_->state().refcount_table.value, table) << "nothing was learnt: the table is a new one";

    std::vector<std::uint64_t> sectors;
    bool flushed = true;
    for (const auto& event : std::span(log_.events()).subspan(begin)) {
        if (event.kind == StorageEvent::Kind::flush_end) flushed = true;
        if (event.kind != StorageEvent::Kind::write || event.at < table || event.at >= table + 512 * 16) continue;
        EXPECT_EQ(event.at / 512, (event.at + event.length - 1) / 512) << "two sectors at once";
        EXPECT_TRUE(flushed) << "two sectors without a flush between them";
        flushed = false;
        sectors.push_back(event.at / 512);
    }
    EXPECT_GE(sectors.size(), 2U);
    EXPECT_TRUE(std::ranges::is_sorted(sectors));
}

}  // namespace
}  // namespace qcow::test
