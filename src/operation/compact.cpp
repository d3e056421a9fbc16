#include "qcow/compact.h"

#include "base/try.h"
#include "base/within_memory.h"
#include "format/header.h"
#include "luks/volume.h"
#include "operation/metadata_files.h"
#include "qcow2/compaction.h"
#include "qcow2/metadata/directories.h"

namespace qcow {
namespace {

/// The cipher of data that depend on their place in the file; null: the data do not, or none move.
Result<std::shared_ptr<const crypto::SectorCipher>> find_cipher(const CompactJob& job, const MetadataFiles& files) {
    const auto header = TRY(format::parse_header(TRY(qcow2::read_first_cluster(*files.image))));
    if (job.dry_run || files.data || header.crypt != format::Crypt::luks) return nullptr;
    const auto& name = files.image->name();
    if (!job.image.keys)
        return fail(Errc::encrypted, name, "it is encrypted, and data that move are encrypted again, with its key");
    const auto key = TRY(job.image.keys({name, "luks", 0}));
    const auto& [at, length] = *header.encryption;
    return luks::unlock({*files.image, at, length}, key, job.image.max_kdf_seconds);
}

}  // namespace

Result<CompactResult> compact(const CompactJob& job, const JobControl& control) {
    return within_memory([&]() -> Result<CompactResult> {
        const auto files = TRY(open_metadata_files(job.image, !job.dry_run, "compacted"));
        constexpr std::uint64_t batch_bytes = 32 * MiB;
        auto result = TRY(qcow2::compact_image(files.image, files.data.get(), job, control, batch_bytes,
                                               TRY(find_cipher(job, files))));
        if (is_device(job.image)) result.size_after = result.size_before;
        return result;
    });
}

}  // namespace qcow
