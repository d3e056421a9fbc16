#pragma once
// The files of a new image: begun, filled and given their names in one way.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "qcow/create.h"
#include "qcow/files_in_use.h"
#include "qcow/image_spec.h"

namespace qcow {

/// Passes warnings on, and keeps them for the result of a job.
class Warnings {
public:
    explicit Warnings(const Warn& told) : told_(told) {}

    void add(Warning warning) {
        if (told_) told_(warning);
        all_.push_back(std::move(warning));
    }

    [[nodiscard]] Warn to() {
        return [this](const Warning& warning) { add(warning); };
    }

    [[nodiscard]] std::vector<Warning> take() { return std::move(all_); }

private:
    const Warn& told_;
    std::vector<Warning> all_;
};

/// Returns the virtual size of a new image for the contents of `source`. Errors: Errc::invalid_argument: it is smaller.
Result<std::uint64_t> size_for(const Disk& source, const CreateOptions& options);

/// Refuses options that a raw disk does not have.
Result<void> verify_raw(const CreateOptions& options);

/// Refuses options that an encrypted disk does not have.
Result<void> verify_luks(CreateOptions options);

/// The image with the names that it is to record, and the format of the backing file that its name says.
Result<NewImage> with_recorded_names(NewImage image);

/// The backing file of an image with_recorded_names. Errc::invalid_argument where its format is not named.
Result<ImageSpec> backing_of(const NewImage& image);

/// Adds the file of an image, and the data file that it names if that can be found out. Not its backing chain.
Result<void> add_alone(FilesInUse& in_use, FilesInUse::Use use, const ImageSpec& spec, const std::string& role);

/// Fills the files. The flag says whether the image's file reads as zeros.
using Fill = std::function<Result<void>(const NewImageFiles& files, bool starts_as_zeros)>;

/// Begins the files of the image, which has the `role` in the job, lets `fill` give them contents, and publishes them,
/// the data file first. Warns before it does what cannot be undone. An error says what is left incomplete.
Result<void> make_files(const NewImage& image, const std::string& role, FilesInUse& in_use, Warnings& warnings,
                        const Fill& fill);

}  // namespace qcow
