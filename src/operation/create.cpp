#include "qcow/create.h"

#include "base/within_memory.h"
#include "operation/copier.h"
#include "qcow2/builder.h"

namespace qcow {

Result<void> create_image(const NewImageFiles& files, const CreateOptions& options) {
    return within_memory([&]() -> Result<void> {
        auto builder = TRY(qcow2::Builder::begin(files, options, {}));
        TRY_VOID(builder->preallocate());
        return builder->finish();
    });
}

Result<void> convert_image(Disk& source, const NewImageFiles& files, const CreateOptions& options,
                           const ConvertOptions& convert) {
    return within_memory([&]() -> Result<void> {
        CreateOptions sized = options;
        if (sized.size == 0) sized.size = source.size();
        auto builder = TRY(qcow2::Builder::begin(files, sized, convert));
        TRY_VOID(copy_to(source, *builder, convert.copy.workers, convert.copy.progress));
        return builder->finish();
    });
}

}  // namespace qcow
